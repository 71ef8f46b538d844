// What surrounds the product of a linear stem: raw rows to features before it, bias and position
// after it.
#include "kernel_parts.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

constexpr int64_t kRowsPerChunk = 32;

template <class T>
UML_INLINE void zero_tail(T* out, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; c += kWidth) store_n(out + c, Vec{}, to - c);
}

// Gathers patch `row` in (row, column, channel) order.
UML_INLINE void gather_patch(const PatchShape& s, const uint8_t* pixels, int64_t row,
                             uint8_t* out) {
  const int64_t across = s.width / s.patch_width, down = s.height / s.patch_height;
  const int64_t line = s.patch_width * s.channels, image_line = s.width * s.channels;
  const int64_t image = row / (across * down), place = row % (across * down);
  const uint8_t* first = pixels +
                         (image * s.height + place / across * s.patch_height) * image_line +
                         place % across * line;
  for (int64_t y = 0; y < s.patch_height; ++y) {
    std::memcpy(out + y * line, first + y * image_line, line);
  }
}

template <class T>
void normalise_rows(const PatchShape& s, const uint8_t* pixels, const float* scale,
                    const float* shift, T* out, int64_t stride, int64_t begin, int64_t end) {
  const int64_t elems = s.patch_height * s.patch_width * s.channels;
  uint8_t* buffer = reinterpret_cast<uint8_t*>(thread_scratch((elems + 3) / 4));
  const bool is_cut = s.width == s.patch_width;  // patches lie one after the other
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* in = is_cut ? pixels + row * elems : buffer;
    if (!is_cut) gather_patch(s, pixels, row, buffer);
    T* o = out + row * stride;
    for (int64_t c = 0; c < elems; c += kWidth) {
      const int64_t n = elems - c;
      store_n(o + c, load_n(in + c, n) * load_n(scale + c, n) + load_n(shift + c, n), n);
    }
    zero_tail(o, elems, stride);
  }
}

template <class T, bool kStandardise>
void standardise_range(const float* input, const float* mean, const float* inverse,
                       const bool* valid, T* out, int64_t cols, int64_t stride, int64_t begin,
                       int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* o = out + row * stride;
    if (valid && !valid[row]) {
      zero_tail(o, 0, stride);
      continue;
    }
    const float* in = input + row * cols;
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = cols - c;
      Vec x = load_n(in + c, n);
      if constexpr (kStandardise) x = (x - load_n(mean + c, n)) * load_n(inverse + c, n);
      store_n(o + c, x, n);
    }
    zero_tail(o, cols, stride);
  }
}

template <class T>
void add_rows(T* tokens, const float* bias, const float* position, const int32_t* index,
              int64_t period, int64_t size, int64_t cols, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t place = index ? index[row] : row % period;
    const float* p = position + larger(0, smaller(place, size - 1)) * cols;
    T* t = tokens + row * cols;
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = cols - c;
      store_n(t + c, load_n(t + c, n) + (load_n(bias + c, n) + load_n(p + c, n)), n);
    }
  }
}

}  // namespace

void normalise_patches(int threads, DType dtype, PatchShape shape, const uint8_t* pixels,
                       const float* mean, const float* deviation, void* out, int64_t stride) {
  const int64_t elems = shape.patch_height * shape.patch_width * shape.channels;
  const int64_t rows =
      shape.images * (shape.height / shape.patch_height) * (shape.width / shape.patch_width);
  const Floats scale(elems), shift(elems);
  for (int64_t i = 0; i < elems; ++i) {
    const int64_t channel = i % shape.channels;
    scale.data[i] = static_cast<float>(1 / (255.0 * deviation[channel]));
    shift.data[i] = static_cast<float>(-static_cast<double>(mean[channel]) / deviation[channel]);
  }
  with_type(dtype, [&]<class T>(T*) {
    parallel_for(threads, rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
      normalise_rows(shape, pixels, scale.data, shift.data, static_cast<T*>(out), stride, begin,
                     end);
    });
  });
}

void standardise_rows(int threads, DType dtype, const float* input, const float* mean,
                      const float* deviation, const bool* valid, int64_t rows, int64_t cols,
                      void* out, int64_t stride) {
  const Floats inverse(mean ? cols : 0);
  if (mean) {
    for (int64_t c = 0; c < cols; ++c) inverse.data[c] = 1 / deviation[c];
  }
  with_type(dtype, [&]<class T>(T*) {
    T* o = static_cast<T*>(out);
    parallel_for(threads, rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
      if (mean) {
        standardise_range<T, true>(input, mean, inverse.data, valid, o, cols, stride, begin, end);
      } else {
        standardise_range<T, false>(input, mean, inverse.data, valid, o, cols, stride, begin, end);
      }
    });
  });
}

void add_position(int threads, DType dtype, void* tokens, const float* bias, const float* position,
                  const int32_t* index, int64_t period, int64_t size, int64_t rows, int64_t cols) {
  with_type(dtype, [&]<class T>(T*) {
    parallel_for(threads, rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
      add_rows(static_cast<T*>(tokens), bias, position, index, period, size, cols, begin, end);
    });
  });
}

}  // namespace uml::UML_ARCH
