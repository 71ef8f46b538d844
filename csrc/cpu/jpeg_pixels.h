// From planes of bytes to pixels in patches: libjpeg's smooth upsampling of colours and its RGB.
#pragma once

#include <cstring>

#include "jpeg_scan.h"

namespace uml::UML_ARCH {
namespace {

UML_INLINE int fixed(double x) { return static_cast<int>(x * 65536 + 0.5); }

#if defined(__AVX2__)
UML_INLINE __m256i widened(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#endif

// Two bytes for each of `count` of a row of colour: near weighs 3 and far 1 (both the same row
// where colours are not halved in height), then here 3 and the neighbour 1. The two roundings are
// libjpeg's, which alternate so that no drift builds up. Reads one byte before the rows; may read
// and write kRowSlack bytes behind.
template <bool kIsHalfHeight>
UML_INLINE void widen(const uint8_t* near, const uint8_t* far, int64_t count, uint8_t* out) {
  constexpr int kShift = kIsHalfHeight ? 4 : 2;
  constexpr int kRoundLeft = kIsHalfHeight ? 8 : 1;
  constexpr int kRoundRight = kIsHalfHeight ? 7 : 2;
#if defined(__AVX2__)
  const __m256i weight = _mm256_set1_epi16(3);
  const auto column = [&](int64_t i) {
    const __m256i here = widened(near + i);
    return kIsHalfHeight ? _mm256_add_epi16(_mm256_mullo_epi16(here, weight), widened(far + i))
                         : here;
  };
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i three = _mm256_mullo_epi16(column(i), weight);
    const auto rounded = [&](__m256i neighbour, short round) {
      const __m256i sum = _mm256_add_epi16(three, neighbour);
      return _mm256_srli_epi16(_mm256_add_epi16(sum, _mm256_set1_epi16(round)), kShift);
    };
    const __m256i left = rounded(column(i - 1), kRoundLeft);
    const __m256i right = rounded(column(i + 1), kRoundRight);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * i),
                        _mm256_or_si256(left, _mm256_slli_epi16(right, 8)));
  }
#else
  const auto sum = [&](int64_t i) { return kIsHalfHeight ? 3 * near[i] + far[i] : near[i]; };
  for (int64_t i = 0; i < count; ++i) {
    out[2 * i] = static_cast<uint8_t>((3 * sum(i) + sum(i - 1) + kRoundLeft) >> kShift);
    out[2 * i + 1] = static_cast<uint8_t>((3 * sum(i) + sum(i + 1) + kRoundRight) >> kShift);
  }
#endif
}

// Row y of a colour plane at the picture's width.
UML_INLINE const uint8_t* colour_row(const JpegFile& file, const Planes& planes, int c, int64_t y,
                                     uint8_t* out) {
  const uint8_t* plane = planes.plane[c];
  const int64_t stride = planes.stride[c];
  if (file.component[0].horizontal == 1) return plane + y * stride;
  const int64_t count = (file.width + 1) / 2;
  if (file.component[0].vertical == 1) {
    widen<false>(plane + y * stride, plane + y * stride, count, out);
  } else {
    const int64_t last = (file.height + 1) / 2 - 1;
    const int64_t near = y / 2;
    const int64_t far = larger(smaller(y % 2 == 0 ? near - 1 : near + 1, last), 0);
    widen<true>(plane + near * stride, plane + far * stride, count, out);
  }
  return out;
}

// The ends of colour rows repeat, so that they have neighbours.
void repeat_ends(const JpegFile& file, const Planes& planes) {
  const int64_t count = (file.width + 1) / 2;
  const int64_t rows = file.component[0].vertical == 2 ? (file.height + 1) / 2 : file.height;
  for (int c = 1; c < 3; ++c) {
    uint8_t* row = planes.plane[c];
    for (int64_t y = 0; y < rows; ++y, row += planes.stride[c]) {
      row[-1] = row[0];
      row[count] = row[count - 1];
    }
  }
}

// Where the pixels of a row go: pieces of `width` pixels, `step` bytes apart.
struct Pieces {
  uint8_t* first;
  int64_t width;
  int64_t step;
};

// libjpeg's fixed-point YCbCr to RGB. Works on 16 pixels at a time; up to kRowSlack bytes behind
// the rows are read and written.
void to_rgb(const uint8_t* y, const uint8_t* cb, const uint8_t* cr, int64_t width, Pieces out) {
  constexpr int kOne = 65536;
#if defined(__AVX2__)
  // factors of 16 bits: whole ones are added apart
  const __m256i red_to_red = pair(fixed(1.40200) - kOne, -32768);
  const __m256i blue_to_blue = pair(fixed(1.77200) - 2 * kOne, -32768);
  const __m256i both_to_green = pair(-fixed(0.34414), kOne - fixed(0.71414));
  const __m256i half = _mm256_set1_epi32(32768);
  const __m256i centre = _mm256_set1_epi16(128);
  const __m256i minus_one = _mm256_set1_epi16(-1);
  const __m256i rg_first = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 8, -1, 1, 9, -1, 2, 10, -1, 3, 11, -1, 4, 12, -1, 5));
  const __m256i b_first = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1));
  const __m256i rg_last = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(13, -1, 6, 14, -1, 7, 15, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i b_last = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, -1, -1, -1, -1, -1, -1));
  // (a * first factor + b * second + more) >> 16
  const auto products = [](__m256i a, __m256i b, __m256i factors, __m256i more) {
    const __m256i lo = _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), factors);
    const __m256i hi = _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), factors);
    return _mm256_packs_epi32(_mm256_srai_epi32(_mm256_add_epi32(lo, more), 16),
                              _mm256_srai_epi32(_mm256_add_epi32(hi, more), 16));
  };
  const __m256i none = _mm256_setzero_si256();
  const bool is_whole = out.width % 8 == 0;
  uint8_t* piece = out.first;
  int64_t inside = 0;
  for (int64_t i = 0; is_whole && i < width; i += 16) {
    const __m256i light = widened(y + i);
    const __m256i blue = _mm256_sub_epi16(widened(cb + i), centre);
    const __m256i red = _mm256_sub_epi16(widened(cr + i), centre);
    const __m256i r =
        _mm256_add_epi16(_mm256_add_epi16(light, red), products(red, minus_one, red_to_red, none));
    const __m256i g =
        _mm256_add_epi16(_mm256_sub_epi16(light, red), products(blue, red, both_to_green, half));
    const __m256i b = _mm256_add_epi16(_mm256_add_epi16(light, _mm256_slli_epi16(blue, 1)),
                                       products(blue, minus_one, blue_to_blue, none));
    const __m256i rg8 = _mm256_packus_epi16(r, g);
    const __m256i b8 = _mm256_packus_epi16(b, b);
    const __m256i first =
        _mm256_or_si256(_mm256_shuffle_epi8(rg8, rg_first), _mm256_shuffle_epi8(b8, b_first));
    const __m256i last =
        _mm256_or_si256(_mm256_shuffle_epi8(rg8, rg_last), _mm256_shuffle_epi8(b8, b_last));
    const auto store = [&](__m128i sixteen, __m128i eight) {
      uint8_t* to = piece + 3 * inside;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), sixteen);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 16), eight);
      inside += 8;
      if (inside == out.width) {
        inside = 0;
        piece += out.step;
      }
    };
    store(_mm256_castsi256_si128(first), _mm256_castsi256_si128(last));
    if (i + 8 < width) {
      store(_mm256_extracti128_si256(first, 1), _mm256_extracti128_si256(last, 1));
    }
  }
  if (is_whole) return;
#endif
  const auto byte = [](int v) { return static_cast<uint8_t>(v < 0 ? 0 : v > 255 ? 255 : v); };
  for (int64_t i = 0; i < width; ++i) {
    const int blue = cb[i] - 128;
    const int red = cr[i] - 128;
    const int green = -fixed(0.34414) * blue - fixed(0.71414) * red;
    uint8_t* to = out.first + i / out.width * out.step + 3 * (i % out.width);
    to[0] = byte(y[i] + ((fixed(1.40200) * red + kOne / 2) >> 16));
    to[1] = byte(y[i] + ((green + kOne / 2) >> 16));
    to[2] = byte(y[i] + ((fixed(1.77200) * blue + kOne / 2) >> 16));
  }
}

// The planes to patches: rows of (patch_height, patch_width, channels) bytes, in reading order.
void write_patches(const JpegFile& file, const Planes& planes, Scratch& scratch,
                   const PatchShape& shape, uint8_t* out) {
  const int64_t width = shape.width;
  const bool is_grey = file.components == 1;
  uint8_t* row[2];
  for (int c = 0; c < 2; ++c) row[c] = scratch.row[c].of(static_cast<size_t>(width + kRowSlack));
  if (is_grey) std::memset(row[0], 128, static_cast<size_t>(width + kRowSlack));
  if (!is_grey && file.component[0].horizontal == 2) repeat_ends(file, planes);
  const int64_t line = shape.patch_width * shape.channels;
  const int64_t patch = shape.patch_height * line;
  const int64_t across = width / shape.patch_width;
  for (int64_t y = 0; y < shape.height; ++y) {
    const uint8_t* light = planes.plane[0] + y * planes.stride[0];
    uint8_t* to = out + y / shape.patch_height * across * patch + y % shape.patch_height * line;
    if (shape.channels == 1) {
      for (int64_t x = 0; x < across; ++x) {
        std::memcpy(to + x * patch, light + x * line, static_cast<size_t>(line));
      }
      continue;
    }
    const uint8_t* cb = is_grey ? row[0] : colour_row(file, planes, 1, y, row[0]);
    const uint8_t* cr = is_grey ? cb : colour_row(file, planes, 2, y, row[1]);
    to_rgb(light, cb, cr, width, {to, shape.patch_width, patch});
  }
}

}  // namespace
}  // namespace uml::UML_ARCH
