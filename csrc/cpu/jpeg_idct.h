// The inverse cosine transform of libjpeg-turbo's default ("islow", 13-bit constants), bit for bit.
//
// Two blocks at a time: coefficient (r, c) of block s lies at 16 r + 8 s + c, dequantised.
#pragma once

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace uml::UML_ARCH {

constexpr int kF0298 = 2446;
constexpr int kF0390 = 3196;
constexpr int kF0541 = 4433;
constexpr int kF0765 = 6270;
constexpr int kF0899 = 7373;
constexpr int kF1175 = 9633;
constexpr int kF1501 = 12299;
constexpr int kF1847 = 15137;
constexpr int kF1961 = 16069;
constexpr int kF2053 = 16819;
constexpr int kF2562 = 20995;
constexpr int kF3072 = 25172;
constexpr int kShiftFirst = 11;
constexpr int kShiftSecond = 18;

#if defined(__AVX2__)

UML_INLINE __m256i pair(int a, int b) {
  return _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(b) << 16 | (a & 0xFFFF)));
}

// Sums and differences of 32 bits, rounded and shifted, as 16 bits.
template <int kShift>
UML_INLINE void butterfly(__m256i even_lo, __m256i even_hi, __m256i odd_lo, __m256i odd_hi,
                          __m256i& first, __m256i& last) {
  const __m256i half = _mm256_set1_epi32(1 << (kShift - 1));
  const __m256i lo = _mm256_add_epi32(even_lo, half);
  const __m256i hi = _mm256_add_epi32(even_hi, half);
  first = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_add_epi32(lo, odd_lo), kShift),
                             _mm256_srai_epi32(_mm256_add_epi32(hi, odd_hi), kShift));
  last = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_sub_epi32(lo, odd_lo), kShift),
                            _mm256_srai_epi32(_mm256_sub_epi32(hi, odd_hi), kShift));
}

template <int kShift>
UML_INLINE void idct_pass(__m256i v[8]) {
  const auto madd = [](__m256i x, int a, int b) { return _mm256_madd_epi16(x, pair(a, b)); };
  const auto wide_lo = [](__m256i x) {
    return _mm256_srai_epi32(_mm256_unpacklo_epi16(_mm256_setzero_si256(), x), 3);
  };
  const auto wide_hi = [](__m256i x) {
    return _mm256_srai_epi32(_mm256_unpackhi_epi16(_mm256_setzero_si256(), x), 3);
  };
  const auto add = [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); };
  const auto sub = [](__m256i a, __m256i b) { return _mm256_sub_epi32(a, b); };
  const __m256i sum04 = _mm256_add_epi16(v[0], v[4]);
  const __m256i diff04 = _mm256_sub_epi16(v[0], v[4]);
  const __m256i z3 = _mm256_add_epi16(v[7], v[3]);
  const __m256i z4 = _mm256_add_epi16(v[5], v[1]);
  __m256i even[2][4];
  __m256i odd[2][4];
  for (int h = 0; h < 2; ++h) {
    const auto both = [h](__m256i a, __m256i b) {
      return h == 0 ? _mm256_unpacklo_epi16(a, b) : _mm256_unpackhi_epi16(a, b);
    };
    const __m256i v26 = both(v[2], v[6]);
    const __m256i t2 = madd(v26, kF0541, kF0541 - kF1847);
    const __m256i t3 = madd(v26, kF0541 + kF0765, kF0541);
    const __m256i t0 = h == 0 ? wide_lo(sum04) : wide_hi(sum04);
    const __m256i t1 = h == 0 ? wide_lo(diff04) : wide_hi(diff04);
    even[h][0] = add(t0, t3);
    even[h][1] = add(t1, t2);
    even[h][2] = sub(t1, t2);
    even[h][3] = sub(t0, t3);
    const __m256i z34 = both(z3, z4);
    const __m256i z3w = madd(z34, kF1175 - kF1961, kF1175);
    const __m256i z4w = madd(z34, kF1175, kF1175 - kF0390);
    const __m256i v71 = both(v[7], v[1]);
    const __m256i v53 = both(v[5], v[3]);
    odd[h][0] = add(madd(v71, -kF0899, kF1501 - kF0899), z4w);
    odd[h][1] = add(madd(v53, -kF2562, kF3072 - kF2562), z3w);
    odd[h][2] = add(madd(v53, kF2053 - kF2562, -kF2562), z4w);
    odd[h][3] = add(madd(v71, kF0298 - kF0899, -kF0899), z3w);
  }
  for (int i = 0; i < 4; ++i) {
    butterfly<kShift>(even[0][i], even[1][i], odd[0][i], odd[1][i], v[i], v[7 - i]);
  }
}

// Both 8x8 blocks transposed.
UML_INLINE void transpose(__m256i v[8]) {
  __m256i a[8];
  __m256i b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_unpacklo_epi32(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm256_unpackhi_epi32(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm256_unpacklo_epi32(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm256_unpackhi_epi32(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = _mm256_unpacklo_epi64(b[i], b[4 + i]);
    v[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[4 + i]);
  }
}

inline void idct_two(const int16_t* coefficients, uint8_t* const out[2], const int64_t stride[2]) {
  __m256i v[8];
  for (int r = 0; r < 8; ++r) {
    v[r] = _mm256_load_si256(reinterpret_cast<const __m256i*>(coefficients + 16 * r));
  }
  idct_pass<kShiftFirst>(v);
  transpose(v);
  idct_pass<kShiftSecond>(v);
  transpose(v);
  const __m256i centre = _mm256_set1_epi8(-128);
  for (int r = 0; r < 8; r += 2) {
    const __m256i rows = _mm256_xor_si256(_mm256_packs_epi16(v[r], v[r + 1]), centre);
    const __m128i of[2] = {_mm256_castsi256_si128(rows), _mm256_extracti128_si256(rows, 1)};
    for (int s = 0; s < 2; ++s) {
      uint8_t* at = out[s] + r * stride[s];
      _mm_storel_epi64(reinterpret_cast<__m128i*>(at), of[s]);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(at + stride[s]), _mm_srli_si128(of[s], 8));
    }
  }
}

#else

UML_INLINE int32_t to_int16(int32_t x) {
  return x < INT16_MIN ? INT16_MIN : x > INT16_MAX ? INT16_MAX : x;
}

// Eight values `step` apart, in place. Sums wrap around where vectors of 16 or 32 bits do, so that
// broken files have the same pixels too.
template <int kShift>
UML_INLINE void idct_line(int32_t* x, int step) {
  const auto at = [&](int i) -> int32_t& { return x[i * step]; };
  const auto times = [](int32_t v, int factor) { return static_cast<uint32_t>(v * factor); };
  const auto short_sum = [](int32_t a, int32_t b) { return static_cast<int16_t>(a + b); };
  const uint32_t t2 = times(at(2), kF0541) + times(at(6), kF0541 - kF1847);
  const uint32_t t3 = times(at(2), kF0541 + kF0765) + times(at(6), kF0541);
  const uint32_t t0 = times(short_sum(at(0), at(4)), 8192);
  const uint32_t t1 = times(short_sum(at(0), -at(4)), 8192);
  const uint32_t even[4] = {t0 + t3, t1 + t2, t1 - t2, t0 - t3};
  const int32_t sum73 = short_sum(at(7), at(3));
  const int32_t sum51 = short_sum(at(5), at(1));
  const uint32_t z3 = times(sum73, kF1175 - kF1961) + times(sum51, kF1175);
  const uint32_t z4 = times(sum73, kF1175) + times(sum51, kF1175 - kF0390);
  const uint32_t odd[4] = {
      times(at(7), -kF0899) + times(at(1), kF1501 - kF0899) + z4,
      times(at(5), -kF2562) + times(at(3), kF3072 - kF2562) + z3,
      times(at(5), kF2053 - kF2562) + times(at(3), -kF2562) + z4,
      times(at(7), kF0298 - kF0899) + times(at(1), -kF0899) + z3,
  };
  for (int i = 0; i < 4; ++i) {
    const uint32_t rounded = even[i] + (1u << (kShift - 1));
    at(i) = to_int16(static_cast<int32_t>(rounded + odd[i]) >> kShift);
    at(7 - i) = to_int16(static_cast<int32_t>(rounded - odd[i]) >> kShift);
  }
}

inline void idct_two(const int16_t* coefficients, uint8_t* const out[2], const int64_t stride[2]) {
  for (int s = 0; s < 2; ++s) {
    int32_t x[64];
    for (int i = 0; i < 64; ++i) x[i] = coefficients[16 * (i / 8) + 8 * s + i % 8];
    for (int c = 0; c < 8; ++c) idct_line<kShiftFirst>(x + c, 8);
    for (int r = 0; r < 8; ++r) {
      idct_line<kShiftSecond>(x + 8 * r, 1);
      for (int c = 0; c < 8; ++c) {
        const int32_t v = x[8 * r + c] + 128;
        out[s][r * stride[s] + c] = static_cast<uint8_t>(v < 0 ? 0 : v > 255 ? 255 : v);
      }
    }
  }
}

#endif

}  // namespace uml::UML_ARCH
