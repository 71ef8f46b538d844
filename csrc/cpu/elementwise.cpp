// Dropout, and bias + activation + dropout over the wide activation of a feed-forward block.
#include "kernel_parts.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

// Rows of one chunk of work: enough to pay for handing it out, and the granularity of partial
// column sums.
constexpr int64_t kRowsPerChunk = 32;

UML_INLINE Vec activate(Activation activation, Vec x) {
  if (activation == Activation::relu) return x > 0.0f ? x : x != x ? x : Vec{};
  Vec cdf, density;
  normal(x, cdf, density);
  return x * cdf;
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
      Vec y0 = activate(kActivation, load_n(in + c, n) + load_n(bias + c, n));
      Vec y1 = activate(
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

UML_INLINE Vec gelu_slope(Vec x) {
  Vec cdf, density;
  normal(x, cdf, density);
  return cdf + x * density;
}

// For relu, saved > 0 says active and kept at once, so no mask is drawn.
template <class T, Activation kActivation, bool kDrop>
void activation_bwd_rows(const T* saved, const float* bias, T* grad, float* sums, int64_t begin,
                         int64_t end, int64_t cols, Dropout drop) {
  for (int64_t c = 0; c < cols; ++c) sums[c] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const RowMask mask(drop, row, cols);
    const T* s = saved + row * cols;
    T* g = grad + row * cols;
    for (int64_t c = 0; c < cols; c += 2 * kWidth) {
      const int64_t n = cols - c;
      Vec g0 = load_n(g + c, n), g1 = load_n(g + c + kWidth, n - kWidth);
      const Vec s0 = load_n(s + c, n), s1 = load_n(s + c + kWidth, n - kWidth);
      if constexpr (kActivation == Activation::relu) {
        g0 = s0 > 0.0f ? g0 * drop.scale : Vec{};
        g1 = s1 > 0.0f ? g1 * drop.scale : Vec{};
      } else {
        g0 *= gelu_slope(s0 + load_n(bias + c, n));
        g1 *= gelu_slope(s1 + load_n(bias + c + kWidth, n - kWidth));
        if constexpr (kDrop) {
          Vec m0, m1;
          mask.factors(c, m0, m1);
          g0 *= m0;
          g1 *= m1;
        }
      }
      store_n(g + c, g0, n);
      store_n(g + c + kWidth, g1, n - kWidth);
      store_n(sums + c, load_n(sums + c, n) + g0, n);
      store_n(sums + c + kWidth, load_n(sums + c + kWidth, n - kWidth) + g1, n - kWidth);
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

// Calls f with (activation, drops) as compile-time constants.
template <class F>
void with_variant(Activation activation, bool drops, F&& f) {
  if (activation == Activation::relu) {
    drops ? f.template operator()<Activation::relu, true>()
          : f.template operator()<Activation::relu, false>();
  } else {
    drops ? f.template operator()<Activation::gelu, true>()
          : f.template operator()<Activation::gelu, false>();
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
        activation_fwd_rows<T, kActivation, kDrop>(static_cast<const T*>(pre), bias,
                                                   static_cast<T*>(out), begin, end, cols, drop);
      });
    });
  });
}

void activation_bwd(int threads, DType dtype, Activation activation, const void* saved,
                    const float* bias, void* grad, float* bias_grad, int64_t rows, int64_t cols,
                    Dropout drop) {
  const int64_t chunks = (rows + kRowsPerChunk - 1) / kRowsPerChunk;
  const Floats partial(chunks * cols);
  with_type(dtype, [&]<class T>(T*) {
    with_variant(activation, drop.threshold > 0, [&]<Activation kActivation, bool kDrop>() {
      parallel_for(threads, rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
        activation_bwd_rows<T, kActivation, kDrop>(
            static_cast<const T*>(saved), bias, static_cast<T*>(grad),
            partial.data + begin / kRowsPerChunk * cols, begin, end, cols, drop);
      });
    });
  });
  sum_partials(threads, partial.data, chunks, cols, bias_grad);
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
