// Vectors of the instruction set this file is compiled for, in the namespace uml::UML_ARCH.
//
// Kernel sources are compiled once per instruction set. Everything they use must be in this
// namespace (or not be inline): an inline function shared between the copies would be merged by the
// linker into one of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace uml::UML_ARCH {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kRegisterColumns = 4;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kRegisterColumns = 2;
#else
constexpr int kWidth = 4;
constexpr int kRegisterColumns = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecI __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecU __attribute__((vector_size(4 * kWidth)));
typedef uint16_t VecH __attribute__((vector_size(2 * kWidth)));

struct bf16 {
  uint16_t bits;
};

#define UML_INLINE inline __attribute__((always_inline))

UML_INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
UML_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
UML_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Minus zero, not plus: x + 0 is another number for x = -0, so that would stay an addition.
UML_INLINE Vec splat(float x) { return x - Vec{}; }

using Lanes = std::make_integer_sequence<int, kWidth>;

template <int... kLane>
UML_INLINE VecI iota(std::integer_sequence<int, kLane...>) {
  return VecI{kLane...};
}
UML_INLINE VecI iota() { return iota(Lanes()); }

UML_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

UML_INLINE Vec from_bf16(VecH h) {
#if defined(__AVX512F__)
  // The zero-masked form of the conversion: the plain one sets off a false warning of GCC 12.
  return (Vec)((VecU)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)h) << 16);
#else
  return (Vec)(__builtin_convertvector(h, VecU) << 16);
#endif
}

UML_INLINE Vec load(const bf16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
  return from_bf16(h);
}

UML_INLINE Vec load(const uint8_t* p) {
#if defined(__AVX512F__)
  // Zero-masked for the reason above.
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return __builtin_convertvector((VecI)_mm512_maskz_cvtepu8_epi32(0xFFFF, bytes), Vec);
#else
  typedef uint8_t VecB __attribute__((vector_size(kWidth)));
  VecB bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, VecI), Vec);
#endif
}

UML_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest even; NaN stays NaN.
UML_INLINE VecH to_bf16(Vec v) {
#if defined(__AVX512BF16__)
  return (VecH)_mm512_cvtneps_pbh((__m512)v);
#else
  const VecU u = (VecU)v;
  const VecU rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  const VecU nan = (u >> 16) | 0x40;
  return __builtin_convertvector((VecU)(v == v ? rounded : nan), VecH);
#endif
}

UML_INLINE void store(bf16* p, Vec v) {
  const VecH h = to_bf16(v);
  std::memcpy(p, &h, sizeof h);
}

// The first n < kWidth lanes; the others are zero.
template <class T>
UML_INLINE Vec load_part(const T* p, int64_t n) {
  T buffer[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
UML_INLINE void store_part(T* p, Vec v, int64_t n) {
  T buffer[kWidth];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
UML_INLINE Vec load_part(const float* p, int64_t n) {
  return (Vec)_mm512_maskz_loadu_ps((1u << n) - 1, p);
}
UML_INLINE Vec load_part(const bf16* p, int64_t n) {
  return from_bf16((VecH)_mm256_maskz_loadu_epi16((1u << n) - 1, p));
}
UML_INLINE void store_part(float* p, Vec v, int64_t n) {
  _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
}
UML_INLINE void store_part(bf16* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)to_bf16(v));
}
#endif

// n lanes, n <= 0 none, n >= kWidth all.
template <class T>
UML_INLINE Vec load_n(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : n > 0 ? load_part(p, n) : Vec{};
}

template <class T>
UML_INLINE void store_n(T* p, Vec v, int64_t n) {
  if (n >= kWidth) {
    store(p, v);
  } else if (n > 0) {
    store_part(p, v, n);
  }
}

// Stores whole vectors past the caches, where the instruction set can: p is aligned to what is
// stored, and stream_fence() comes before another thread is told of the data.
#if defined(__AVX512F__)
UML_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, (__m512)v); }
UML_INLINE void stream(bf16* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)to_bf16(v));
}
UML_INLINE void stream_fence() { _mm_sfence(); }
#else
template <class T>
UML_INLINE void stream(T* p, Vec v) {
  store(p, v);
}
UML_INLINE void stream_fence() {}
#endif

UML_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

UML_INLINE float sum(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

UML_INLINE float max(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

// e**x for x <= 88, relative error below 2e-7; 0 below -87.
UML_INLINE Vec exp(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vec scaled = (Vec)((VecI)p + ((VecI)shifted << 23));
  return x < -87.0f ? Vec{} : scaled;
}

// 2**x for x <= 127, relative error below 2e-7; 2**-126 below that.
UML_INLINE Vec exp2(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
  x = vmax(splat(-126.0f), x);
  const Vec shifted = x + magic;
  const Vec r = x - (shifted - magic);
  Vec p = splat(1.3276471960e-3f);
  p = p * r + 9.6755415026e-3f;
  p = p * r + 5.5507132751e-2f;
  p = p * r + 2.4022119721e-1f;
  p = p * r + 6.9314696706e-1f;
  p = p * r + 1.0f;
  return (Vec)((VecI)p + ((VecI)shifted << 23));
}

// Natural logarithm of normal positive numbers, relative error below 2e-7 (Cephes logf); infinity
// and NaN stay.
UML_INLINE Vec log(Vec x) {
  // Mantissa in [sqrt(1/2), sqrt(2)): the exponent counts from that of sqrt(1/2).
  const VecI above = (VecI)x - 0x3F3504F3;
  const VecI exponent = above >> 23;
  const Vec e = __builtin_convertvector(exponent, Vec);
  const Vec m = (Vec)((VecI)x - (exponent << 23)) - 1.0f;
  Vec p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vec small = p * m * m * m + e * -2.12194440e-4f - 0.5f * m * m;
  return x < __builtin_inff() ? small + m + e * 0.693359375f : x;
}

UML_INLINE Vec magnitude(Vec x) { return (Vec)((VecI)x & 0x7FFFFFFF); }

// The normal distribution function Phi(x) and density phi(x); absolute error below 2e-7
// (Abramowitz, Stegun 7.1.26).
UML_INLINE void normal(Vec x, Vec& cdf, Vec& density) {
  const Vec z = x * 0.707106781f;
  const Vec a = z < 0.0f ? -z : z;
  const Vec t = 1.0f / (1.0f + 0.3275911f * a);
  const Vec e = exp(-a * a);
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec tail = 0.5f * p * t * e;
  cdf = z < 0.0f ? tail : 1.0f - tail;
  density = e * 0.398942280f;
}

// low, high = a[0], b[0], a[1], b[1], ...
template <int... kLane>
UML_INLINE void interleave(Vec a, Vec b, Vec& low, Vec& high,
                           std::integer_sequence<int, kLane...>) {
  low = __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kWidth)...);
  high = __builtin_shufflevector(a, b, ((kWidth + kLane) / 2 + kLane % 2 * kWidth)...);
}

// The 32 random bits of mask pairs, two lanes of 16 (rng.py).
UML_INLINE VecU mask_hash(VecU pair, uint32_t key_low, VecU key_high) {
  VecU x = pair ^ key_low;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15) ^ key_high) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Keep factors (0 or scale) of one row of a dropout mask.
struct RowMask {
  uint32_t first;  // low half of the row's first pair index
  uint32_t key_low;
  uint32_t key_high;
  uint32_t threshold;
  float scale;

  UML_INLINE RowMask(const Dropout& d, int64_t row, int64_t cols) {
    const uint64_t pair = static_cast<uint64_t>(row) * static_cast<uint64_t>((cols + 1) / 2);
    first = static_cast<uint32_t>(pair);
    key_low = static_cast<uint32_t>(d.key);
    key_high =
        static_cast<uint32_t>(d.key >> 32) ^ (static_cast<uint32_t>(pair >> 32) * 0x9E3779B9u);
    threshold = d.threshold;
    scale = d.scale;
  }

  // Factors of columns [col, col + kWidth) in `low` and of the kWidth columns after them in `high`;
  // col is even.
  UML_INLINE void factors(int64_t col, Vec& low, Vec& high) const {
    const VecU pair = (VecU)iota() + (first + static_cast<uint32_t>(col / 2));
    const VecU x = mask_hash(pair, key_low, VecU{} + key_high);
#if defined(__AVX512BW__)
    const __mmask32 keep =
        _mm512_cmpge_epu16_mask((__m512i)x, _mm512_set1_epi16(static_cast<short>(threshold)));
    low = (Vec)_mm512_maskz_mov_ps(static_cast<__mmask16>(keep), (__m512)splat(scale));
    high = (Vec)_mm512_maskz_mov_ps(static_cast<__mmask16>(keep >> 16), (__m512)splat(scale));
#else
    const VecI limit = VecI{} + static_cast<int32_t>(threshold);
    const Vec even = (VecI)(x & 0xFFFF) >= limit ? splat(scale) : Vec{};
    const Vec odd = (VecI)(x >> 16) >= limit ? splat(scale) : Vec{};
    interleave(even, odd, low, high, Lanes());
#endif
  }
};

// Exchanges bit kStep of the row number with bit kStep of the lane number, for rows a and b = a +
// kStep.
template <int kStep, int... kLane>
UML_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
  const Vec low =
      __builtin_shufflevector(a, b, (kLane & kStep ? kLane - kStep + kWidth : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kLane + kWidth : kLane + kStep)...);
  a = low;
}

template <int kStep>
UML_INLINE void transpose_from(Vec* v) {
  if constexpr (kStep < kWidth) {
    for (int i = 0; i < kWidth; ++i) {
      if (!(i & kStep)) exchange<kStep>(v[i], v[i + kStep], Lanes());
    }
    transpose_from<2 * kStep>(v);
  }
}

// Transposes kWidth vectors in place.
UML_INLINE void transpose(Vec* v) { transpose_from<1>(v); }

// Uninitialised elements for the duration of a scope.
template <class T>
struct Array {
  T* data;
  UML_INLINE explicit Array(int64_t count) : data(new T[count]) {}
  UML_INLINE ~Array() { delete[] data; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
};
using Floats = Array<float>;

// Calls f with a null pointer to the element type of `dtype`.
template <class F>
UML_INLINE void with_type(DType dtype, F&& f) {
  if (dtype == DType::bf16) {
    f(static_cast<bf16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

}  // namespace uml::UML_ARCH
