// Dropout, and bias + activation + dropout over the wide activation of a feed-forward block.
#include "kernel_parts.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

// Rows of one chunk of work: enough to pay for handing it out, and the granularity of partial
// column sums.
constexpr int64_t kRowsPerChunk = 32;
constexpr int64_t kRowsPerTranspose = 128;

// Coefficients of p in 1/2 + x p(u), u = 2 (x / 5)^2 - 1, fitted on |x| <= 5 (largest error 9e-7
// for the normal distribution function, 1.3e-5 for the slope of GELU) and exact at 5, where both
// are 0 or 1 to 3e-7 and 8e-6. For bf16, which rounds at 2e-3: no division and no exponential, so
// GELU takes a quarter of the time.
constexpr float kNormal[] = {0.141363605f,   -0.0702979221f,  0.0515350447f,  -0.0404043133f,
                             0.0312567861f,  -0.0235136402f,  0.0172614508f,  -0.0105346985f,
                             0.00462125263f, -0.00338474959f, 0.00343096766f, -0.00133378308f};
constexpr float kGeluSlope[] = {0.142130563f,  -0.0751237369f, 0.0668272502f, -0.0715196339f,
                                0.0770794695f, -0.0854979852f, 0.0951514038f, -0.0680820267f,
                                0.0211880464f, -0.0281275974f, 0.0465323151f, -0.0205580677f};

template <int kCount>
UML_INLINE Vec half_plus_odd(const float (&p)[kCount], Vec x) {
  // In this order NaN stays.
  const Vec limit = splat(5.0f);
  x = limit < x ? limit : x;
  x = -limit > x ? -limit : x;
  const Vec u = x * x * 0.08f - 1.0f;
  Vec y = splat(p[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) y = y * u + p[i];
  return x * y + 0.5f;
}

// T: what the result is rounded to.
template <class T>
UML_INLINE Vec gelu(Vec x) {
  if constexpr (sizeof(T) == 2) return x * half_plus_odd(kNormal, x);
  Vec cdf, density;
  normal(x, cdf, density);
  return x * cdf;
}

template <class T>
UML_INLINE Vec gelu_slope(Vec x) {
  if constexpr (sizeof(T) == 2) return half_plus_odd(kGeluSlope, x);
  Vec cdf, density;
  normal(x, cdf, density);
  return cdf + x * density;
}

template <class T>
UML_INLINE Vec activate(Activation activation, Vec x) {
  if (activation == Activation::relu) return x > 0.0f ? x : x != x ? x : Vec{};
  return gelu<T>(x);
}

template <class T>
void dropout_rows(const T* input, T* out, int64_t begin, int64_t end, int64_t cols, Dropout drop) {
  for (int64_t row = begin; row < end; ++row) {
    const RowMask mask(drop, row, cols);
    const T* in = input + row * cols;
    T* o = out + row * cols;
    for (int64_t c = 0; c < cols; c += 2 * kWidth) {
      Vec m0, m1;
      mask.factors(c, m0, m1);
      const int64_t n = cols - c;
      store_n(o + c, load_n(in + c, n) * m0, n);
      store_n(o + c + kWidth, load_n(in + c + kWidth, n - kWidth) * m1, n - kWidth);
    }
  }
}

template <class T, Activation kActivation, bool kDrop>
void activation_fwd_rows(const T* pre, const float* bias, T* out, int64_t begin, int64_t end,
                         int64_t cols, Dropout drop) {
  for (int64_t row = begin; row < end; ++row) {
    const RowMask mask(drop, row, cols);
    const T* in = pre + row * cols;
    T* o = out + row * cols;
    for (int64_t c = 0; c < cols; c += 2 * kWidth) {
      const int64_t n = cols - c;
      Vec y0 = activate<T>(kActivation, load_n(in + c, n) + load_n(bias + c, n));
      Vec y1 = activate<T>(
          kActivation, load_n(in + c + kWidth, n - kWidth) + load_n(bias + c + kWidth, n - kWidth));
      if constexpr (kDrop) {
        Vec m0, m1;
        mask.factors(c, m0, m1);
        y0 *= m0;
        y1 *= m1;
      }
      store_n(o + c, y0, n);
      store_n(o + c + kWidth, y1, n - kWidth);
    }
  }
}

// For relu, saved > 0 says active and kept at once, so no mask is drawn.
template <class T, Activation kActivation, bool kDrop>
void activation_bwd_rows(const T* saved, const float* bias, const T* grad, T* grad_pre, float* sums,
                         int64_t begin, int64_t end, int64_t cols, Dropout drop) {
  for (int64_t c = 0; c < cols; ++c) sums[c] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const RowMask mask(drop, row, cols);
    const T* s = saved + row * cols;
    const T* g = grad + row * cols;
    T* out = grad_pre + row * cols;
    for (int64_t c = 0; c < cols; c += 2 * kWidth) {
      const int64_t n = cols - c;
      Vec g0 = load_n(g + c, n), g1 = load_n(g + c + kWidth, n - kWidth);
      const Vec s0 = load_n(s + c, n), s1 = load_n(s + c + kWidth, n - kWidth);
      if constexpr (kActivation == Activation::relu) {
        g0 = s0 > 0.0f ? g0 * drop.scale : Vec{};
        g1 = s1 > 0.0f ? g1 * drop.scale : Vec{};
      } else {
        g0 *= gelu_slope<T>(s0 + load_n(bias + c, n));
        g1 *= gelu_slope<T>(s1 + load_n(bias + c + kWidth, n - kWidth));
        if constexpr (kDrop) {
          Vec m0, m1;
          mask.factors(c, m0, m1);
          g0 *= m0;
          g1 *= m1;
        }
      }
      store_n(out + c, g0, n);
      store_n(out + c + kWidth, g1, n - kWidth);
      store_n(sums + c, load_n(sums + c, n) + g0, n);
      store_n(sums + c + kWidth, load_n(sums + c + kWidth, n - kWidth) + g1, n - kWidth);
    }
  }
}

UML_INLINE Vec sigmoid(Vec x) {
  // Beyond 87 the sigmoid of -x is below the smallest normal number.
  return 1.0f / (1.0f + exp(-vmax(x, splat(-87.0f))));
}

// out = silu(gate) * value, both halves of a row of pre.
template <class T, bool kDrop>
void swiglu_fwd_rows(const T* pre, const float* bias, T* out, int64_t begin, int64_t end,
                     int64_t cols, Dropout drop) {
  for (int64_t row = begin; row < end; ++row) {
    const RowMask mask(drop, row, cols);
    const T* in = pre + row * 2 * cols;
    T* o = out + row * cols;
    for (int64_t c = 0; c < cols; c += 2 * kWidth) {
      Vec m[2] = {splat(1.0f), splat(1.0f)};
      if constexpr (kDrop) mask.factors(c, m[0], m[1]);
      for (int64_t i = 0, at = c; i < 2; ++i, at += kWidth) {
        const int64_t n = cols - at;
        const Vec gate = load_n(in + at, n) + load_n(bias + at, n);
        const Vec value = load_n(in + cols + at, n) + load_n(bias + cols + at, n);
        store_n(o + at, gate * sigmoid(gate) * value * m[i], n);
      }
    }
  }
}

template <class T, bool kDrop>
void swiglu_bwd_rows(const T* pre, const float* bias, const T* grad, T* grad_pre, float* sums,
                     int64_t begin, int64_t end, int64_t cols, Dropout drop) {
  for (int64_t c = 0; c < 2 * cols; ++c) sums[c] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const RowMask mask(drop, row, cols);
    const T* in = pre + row * 2 * cols;
    T* out = grad_pre + row * 2 * cols;
    for (int64_t c = 0; c < cols; c += 2 * kWidth) {
      Vec m[2] = {splat(1.0f), splat(1.0f)};
      if constexpr (kDrop) mask.factors(c, m[0], m[1]);
      for (int64_t i = 0, at = c; i < 2; ++i, at += kWidth) {
        const int64_t n = cols - at;
        const Vec gate = load_n(in + at, n) + load_n(bias + at, n);
        const Vec value = load_n(in + cols + at, n) + load_n(bias + cols + at, n);
        const Vec g = load_n(grad + row * cols + at, n) * m[i];
        const Vec slope = sigmoid(gate);
        const Vec silu = gate * slope;
        const Vec grad_gate = g * value * (slope + silu * (1.0f - slope));
        const Vec grad_value = g * silu;
        store_n(out + at, grad_gate, n);
        store_n(out + cols + at, grad_value, n);
        store_n(sums + at, load_n(sums + at, n) + grad_gate, n);
        store_n(sums + cols + at, load_n(sums + cols + at, n) + grad_value, n);
      }
    }
  }
}

template <class T>
void sum_rows(const T* input, float* sums, int64_t begin, int64_t end, int64_t cols) {
  for (int64_t c = 0; c < cols; ++c) sums[c] = 0;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = cols - c;
      store_n(sums + c, load_n(sums + c, n) + load_n(input + row * cols + c, n), n);
    }
  }
}

// Transposes rows [begin, end) and sums their columns. Two blocks of kWidth rows at a time, so that
// bf16 columns are written in whole cache lines.
template <class T>
void transpose_rows(const T* input, T* out, float* sums, int64_t begin, int64_t end, int64_t cols,
                    int64_t stride) {
  for (int64_t c = 0; c < cols; ++c) sums[c] = 0;
  for (int64_t first = begin; first < end; first += 2 * kWidth) {
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = cols - c;
      Vec total = load_n(sums + c, n);
      Vec block[2][kWidth];
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < kWidth; ++i) {
          const int64_t row = first + half * kWidth + i;
          block[half][i] = row < end ? load_n(input + row * cols + c, n) : Vec{};
          total += block[half][i];
        }
        transpose(block[half]);
      }
      store_n(sums + c, total, n);
      for (int i = 0; i < smaller(n, kWidth); ++i) {
        T* o = out + (c + i) * stride + first;
        store(o, block[0][i]);
        store(o + kWidth, block[1][i]);
      }
    }
  }
}

// Calls f with (activation, drops) as compile-time constants.
template <class F>
void with_variant(Activation activation, bool drops, F&& f) {
  auto with_drop = [&]<Activation kActivation>() {
    drops ? f.template operator()<kActivation, true>()
          : f.template operator()<kActivation, false>();
  };
  switch (activation) {
    case Activation::relu:
      return with_drop.template operator()<Activation::relu>();
    case Activation::gelu:
      return with_drop.template operator()<Activation::gelu>();
    case Activation::swiglu:
      return with_drop.template operator()<Activation::swiglu>();
  }
}

}  // namespace

void dropout(int threads, DType dtype, const void* input, void* out, int64_t rows, int64_t cols,
             Dropout drop) {
  with_type(dtype, [&]<class T>(T*) {
    parallel_for(threads, rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
      dropout_rows(static_cast<const T*>(input), static_cast<T*>(out), begin, end, cols, drop);
    });
  });
}

void activation_fwd(int threads, DType dtype, Activation activation, const void* pre,
                    const float* bias, void* out, int64_t rows, int64_t cols, Dropout drop) {
  with_type(dtype, [&]<class T>(T*) {
    with_variant(activation, drop.threshold > 0, [&]<Activation kActivation, bool kDrop>() {
      parallel_for(threads, rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
        const T* in = static_cast<const T*>(pre);
        T* o = static_cast<T*>(out);
        if constexpr (kActivation == Activation::swiglu) {
          swiglu_fwd_rows<T, kDrop>(in, bias, o, begin, end, cols, drop);
        } else {
          activation_fwd_rows<T, kActivation, kDrop>(in, bias, o, begin, end, cols, drop);
        }
      });
    });
  });
}

void activation_bwd(int threads, DType dtype, Activation activation, const void* saved,
                    const float* bias, const void* grad, void* grad_pre, float* bias_grad,
                    int64_t rows, int64_t cols, Dropout drop) {
  const int64_t chunks = (rows + kRowsPerChunk - 1) / kRowsPerChunk;
  const int64_t pre_cols = activation == Activation::swiglu ? 2 * cols : cols;
  const Floats partial(chunks * pre_cols);
  with_type(dtype, [&]<class T>(T*) {
    with_variant(activation, drop.threshold > 0, [&]<Activation kActivation, bool kDrop>() {
      parallel_for(threads, rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
        const T* s = static_cast<const T*>(saved);
        const T* g = static_cast<const T*>(grad);
        T* out = static_cast<T*>(grad_pre);
        float* sums = partial.data + begin / kRowsPerChunk * pre_cols;
        if constexpr (kActivation == Activation::swiglu) {
          swiglu_bwd_rows<T, kDrop>(s, bias, g, out, sums, begin, end, cols, drop);
        } else {
          activation_bwd_rows<T, kActivation, kDrop>(s, bias, g, out, sums, begin, end, cols, drop);
        }
      });
    });
  });
  sum_partials(threads, partial.data, chunks, pre_cols, bias_grad);
}

void column_sum(int threads, DType dtype, const void* input, float* out, int64_t rows,
                int64_t cols) {
  const int64_t chunks = (rows + kRowsPerChunk - 1) / kRowsPerChunk;
  const Floats partial(chunks * cols);
  with_type(dtype, [&]<class T>(T*) {
    parallel_for(threads, rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
      sum_rows(static_cast<const T*>(input), partial.data + begin / kRowsPerChunk * cols, begin,
               end, cols);
    });
  });
  sum_partials(threads, partial.data, chunks, cols, out);
}

void transpose_sum(int threads, DType dtype, const void* input, int64_t rows, int64_t cols,
                   void* out, int64_t stride, float* sums) {
  const int64_t chunks = (rows + kRowsPerTranspose - 1) / kRowsPerTranspose;
  const Floats partial(chunks * cols);
  with_type(dtype, [&]<class T>(T*) {
    parallel_for(threads, rows, kRowsPerTranspose, [&](int64_t begin, int64_t end) {
      transpose_rows(static_cast<const T*>(input), static_cast<T*>(out),
                     partial.data + begin / kRowsPerTranspose * cols, begin, end, cols, stride);
    });
  });
  sum_partials(threads, partial.data, chunks, cols, sums);
}

void sum_partials(int threads, const float* partial, int64_t chunks, int64_t cols, float* out) {
  parallel_for(threads, cols, 512, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kWidth) {
      const int64_t n = smaller(cols, end) - c;
      Vec total{};
      for (int64_t i = 0; i < chunks; ++i) total += load_n(partial + i * cols + c, n);
      store_n(out + c, total, n);
    }
  });
}

}  // namespace uml::UML_ARCH
