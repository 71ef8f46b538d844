// Layer norm or RMS norm of residual + dropout(input), forward and backward. Nothing but the row
// statistics is saved: the backward pass reads the two inputs again and redraws the mask.
#include "kernel_parts.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

// One row of partial sums a chunk: 3 % of the traffic of its rows in bf16.
constexpr int64_t kRowsPerChunk = 32;

// Outputs together larger than this are stored past the caches. At 50 MB that takes backward from
// 9.6 to 6.2 ms (fp32, 8192 x 768, one Sapphire Rapids core); at 12 MB it loses up to 15 %.
constexpr int64_t kStreamBytes = 24 << 20;

// Requests the next row's element at the same column: rows are worked on in bursts that the
// hardware's prefetchers fall behind (backward in bf16, 8192 x 768: 5.9 ms without, 2.7 with).
template <class T>
UML_INLINE void prefetch_row(const T* p, int64_t cols) {
  __builtin_prefetch(p + cols);
  if constexpr (sizeof(T) * 2 * kWidth > 64) __builtin_prefetch(p + cols + kWidth);
}

// Whether kernels may `stream` an output whose rows have this many columns.
template <class T>
UML_INLINE bool is_aligned(const T* p, int64_t cols) {
  return cols % (2 * kWidth) == 0 && reinterpret_cast<uintptr_t>(p) % (kWidth * sizeof(T)) == 0;
}

template <class T>
UML_INLINE void write(T* p, Vec v, int64_t n, bool past_caches) {
  if (past_caches) {
    stream(p, v);
  } else {
    store_n(p, v, n);
  }
}

// residual + dropout(input) of columns [c, c + 2 * kWidth) of a row; beyond its end zero.
template <class In, class Res, bool kDrop>
UML_INLINE void add(const In* input, const Res* residual, int64_t c, int64_t cols,
                    const RowMask& mask, Vec (&x)[2]) {
  const int64_t n = cols - c;
  x[0] = load_n(input + c, n);
  x[1] = load_n(input + c + kWidth, n - kWidth);
  if constexpr (kDrop) {
    Vec m0, m1;
    mask.factors(c, m0, m1);
    x[0] *= m0;
    x[1] *= m1;
  }
  x[0] += load_n(residual + c, n);
  x[1] += load_n(residual + c + kWidth, n - kWidth);
}

// x of lanes beyond the row's end set to zero.
UML_INLINE Vec keep_lanes(Vec x, int64_t n) {
  return iota() < static_cast<int32_t>(smaller(n, kWidth)) ? x : Vec{};
}

template <class In, class Res, bool kDrop, bool kRms>
void fwd_rows(const NormShape& shape, const In* input, const Res* residual, const float* weight,
              const float* bias, float eps, In* normed, Res* summed, float* mean, float* rstd,
              Dropout drop, bool past_caches, int64_t begin, int64_t end) {
  const int64_t cols = shape.cols;
  const float inverse = 1.0f / static_cast<float>(cols);
  float* x = thread_scratch(round_up(cols, 2 * kWidth));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * cols;
    const RowMask mask(drop, row, cols);
    Vec total{}, squares{};
    for (int64_t c = 0; c < cols; c += 2 * kWidth) {
      Vec v[2];
      add<In, Res, kDrop>(input + at, residual + at, c, cols, mask, v);
      prefetch_row(input + at + c, cols);
      prefetch_row(residual + at + c, cols);
      store(x + c, v[0]);
      store(x + c + kWidth, v[1]);
      if constexpr (kRms) {
        squares += v[0] * v[0] + v[1] * v[1];
      } else {
        total += v[0] + v[1];
      }
    }
    float mu = 0;
    if constexpr (!kRms) {
      mu = sum(total) * inverse;
      for (int64_t c = 0; c < cols; c += kWidth) {
        const Vec d = keep_lanes(load(x + c) - mu, cols - c);
        squares += d * d;
      }
      mean[row] = mu;
    }
    const float r = 1.0f / __builtin_sqrtf(sum(squares) * inverse + eps);
    rstd[row] = r;
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = cols - c;
      const Vec v = load(x + c);
      Vec y = (v - mu) * r * load_n(weight + c, n);
      if constexpr (!kRms) y += load_n(bias + c, n);
      write(normed + at + c, y, n, past_caches);
      if (summed) write(summed + at + c, v, n, past_caches);
    }
  }
  if (past_caches) stream_fence();
}

template <class In, class Res, bool kDrop, bool kRms>
void bwd_rows(const NormShape& shape, const In* grad_normed, const Res* grad_summed,
              const In* input, const Res* residual, const float* weight, const float* mean,
              const float* rstd, In* grad_input, Res* grad_residual, float* grad_weight,
              float* grad_bias, Dropout drop, bool past_caches, int64_t begin, int64_t end) {
  const int64_t cols = shape.cols;
  const float inverse = 1.0f / static_cast<float>(cols);
  const int64_t padded = round_up(cols, 2 * kWidth);
  float* normal = thread_scratch(2 * padded);
  float* weighted = normal + padded;
  for (int64_t c = 0; c < cols; ++c) grad_weight[c] = 0;
  if constexpr (!kRms) {
    for (int64_t c = 0; c < cols; ++c) grad_bias[c] = 0;
  }
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * cols;
    const RowMask mask(drop, row, cols);
    const float mu = kRms ? 0.0f : mean[row], r = rstd[row];
    Vec g_sum{}, gx_sum{};
    for (int64_t c = 0; c < cols; c += 2 * kWidth) {
      Vec x[2];
      add<In, Res, kDrop>(input + at, residual + at, c, cols, mask, x);
      prefetch_row(input + at + c, cols);
      prefetch_row(residual + at + c, cols);
      prefetch_row(grad_normed + at + c, cols);
      for (int half = 0; half < 2; ++half) {
        const int64_t h = c + half * kWidth, n = cols - h;
        const Vec dy = load_n(grad_normed + at + h, n);
        const Vec v = (x[half] - mu) * r;
        const Vec g = dy * load_n(weight + h, n);
        gx_sum += g * v;
        store(normal + h, v);
        store(weighted + h, g);
        store_n(grad_weight + h, load_n(grad_weight + h, n) + dy * v, n);
        if constexpr (!kRms) {
          g_sum += g;
          store_n(grad_bias + h, load_n(grad_bias + h, n) + dy, n);
        }
      }
    }
    const float g_mean = kRms ? 0.0f : sum(g_sum) * inverse, gx_mean = sum(gx_sum) * inverse;
    for (int64_t c = 0; c < cols; c += 2 * kWidth) {
      Vec dx[2];
      for (int half = 0; half < 2; ++half) {
        const int64_t h = c + half * kWidth, n = cols - h;
        dx[half] = (load(weighted + h) - g_mean - load(normal + h) * gx_mean) * r;
        if (grad_summed) dx[half] += load_n(grad_summed + at + h, n);
        write(grad_residual + at + h, dx[half], n, past_caches);
      }
      if (!grad_input) continue;
      if constexpr (kDrop) {
        Vec m0, m1;
        mask.factors(c, m0, m1);
        dx[0] *= m0;
        dx[1] *= m1;
      }
      write(grad_input + at + c, dx[0], cols - c, past_caches);
      write(grad_input + at + c + kWidth, dx[1], cols - c - kWidth, past_caches);
    }
  }
  if (past_caches) stream_fence();
}

// Calls f with the types of input and residual, whether anything drops, and whether the norm is the
// RMS norm.
template <class F>
void with_variant(const NormShape& shape, const Dropout& drop, F&& f) {
  with_type(shape.input, [&]<class In>(In*) {
    with_type(shape.residual, [&]<class Res>(Res*) {
      const auto with_norm = [&]<bool kDrop>() {
        shape.is_rms ? f.template operator()<In, Res, kDrop, true>()
                     : f.template operator()<In, Res, kDrop, false>();
      };
      drop.threshold > 0 ? with_norm.template operator()<true>()
                         : with_norm.template operator()<false>();
    });
  });
}

// Whether two outputs, of which one may be null, are large enough and aligned for streaming stores.
template <class A, class B>
bool streams(const NormShape& shape, const A* a, const B* b) {
  const int64_t bytes =
      shape.rows * shape.cols * static_cast<int64_t>(sizeof(A) + (b ? sizeof(B) : 0));
  return bytes >= kStreamBytes && is_aligned(a, shape.cols) && (!b || is_aligned(b, shape.cols));
}

}  // namespace

void add_layer_norm_fwd(int threads, NormShape shape, const void* input, const void* residual,
                        const float* weight, const float* bias, float eps, void* normed,
                        void* summed, float* mean, float* rstd, Dropout drop) {
  const size_t elements = static_cast<size_t>(shape.rows * shape.cols);
  with_variant(shape, drop, [&]<class In, class Res, bool kDrop, bool kRms>() {
    const bool past_caches = streams(shape, static_cast<In*>(normed), static_cast<Res*>(summed));
    prefer_huge_pages(normed, sizeof(In) * elements);
    if (summed) prefer_huge_pages(summed, sizeof(Res) * elements);
    parallel_for(threads, shape.rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
      fwd_rows<In, Res, kDrop, kRms>(shape, static_cast<const In*>(input),
                                     static_cast<const Res*>(residual), weight, bias, eps,
                                     static_cast<In*>(normed), static_cast<Res*>(summed), mean,
                                     rstd, drop, past_caches, begin, end);
    });
  });
}

void add_layer_norm_bwd(int threads, NormShape shape, const void* grad_normed,
                        const void* grad_summed, const void* input, const void* residual,
                        const float* weight, const float* mean, const float* rstd, void* grad_input,
                        void* grad_residual, float* grad_weight, float* grad_bias, Dropout drop) {
  const int64_t chunks = (shape.rows + kRowsPerChunk - 1) / kRowsPerChunk, cols = shape.cols;
  const Floats partial((shape.is_rms ? 1 : 2) * chunks * cols);
  float* partial_bias = partial.data + chunks * cols;
  const size_t elements = static_cast<size_t>(shape.rows * shape.cols);
  with_variant(shape, drop, [&]<class In, class Res, bool kDrop, bool kRms>() {
    const bool past_caches =
        streams(shape, static_cast<Res*>(grad_residual), static_cast<In*>(grad_input));
    prefer_huge_pages(grad_residual, sizeof(Res) * elements);
    if (grad_input) prefer_huge_pages(grad_input, sizeof(In) * elements);
    parallel_for(threads, shape.rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
      const int64_t chunk = begin / kRowsPerChunk;
      bwd_rows<In, Res, kDrop, kRms>(
          shape, static_cast<const In*>(grad_normed), static_cast<const Res*>(grad_summed),
          static_cast<const In*>(input), static_cast<const Res*>(residual), weight, mean, rstd,
          static_cast<In*>(grad_input), static_cast<Res*>(grad_residual),
          partial.data + chunk * cols, partial_bias + chunk * cols, drop, past_caches, begin, end);
    });
  });
  sum_partials(threads, partial.data, chunks, cols, grad_weight);
  if (!shape.is_rms) sum_partials(threads, partial_bias, chunks, cols, grad_bias);
}

}  // namespace uml::UML_ARCH
