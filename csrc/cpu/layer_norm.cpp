// Layer norm of residual + dropout(input), forward and backward. Nothing but the row statistics is
// saved: the backward pass reads the two inputs again and redraws the mask.
#include "kernel_parts.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

constexpr int64_t kRowsPerChunk = 16;

// Writes residual + dropout(input) of one row to `x` (padded with zeros to 2 * kWidth); returns its
// sum.
template <class In, class Res, bool kDrop>
UML_INLINE float add_row(const In* input, const Res* residual, float* x, int64_t cols,
                         const RowMask& mask) {
  Vec total{};
  for (int64_t c = 0; c < cols; c += 2 * kWidth) {
    const int64_t n = cols - c;
    Vec b0 = load_n(input + c, n), b1 = load_n(input + c + kWidth, n - kWidth);
    if constexpr (kDrop) {
      Vec m0, m1;
      mask.factors(c, m0, m1);
      b0 *= m0;
      b1 *= m1;
    }
    b0 += load_n(residual + c, n);
    b1 += load_n(residual + c + kWidth, n - kWidth);
    store(x + c, b0);
    store(x + c + kWidth, b1);
    total += b0 + b1;
  }
  return sum(total);
}

// x of lanes beyond the row's end set to `value`.
UML_INLINE Vec keep_lanes(Vec x, int64_t n, Vec value) {
  return iota() < static_cast<int32_t>(smaller(n, kWidth)) ? x : value;
}

template <class In, class Res, bool kDrop>
void fwd_rows(const NormShape& shape, const In* input, const Res* residual, const float* weight,
              const float* bias, float eps, In* normed, Res* summed, float* mean, float* rstd,
              Dropout drop, int64_t begin, int64_t end) {
  const int64_t cols = shape.cols;
  float* x = thread_scratch(round_up(cols, 2 * kWidth));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * cols;
    const float mu =
        add_row<In, Res, kDrop>(input + at, residual + at, x, cols, RowMask(drop, row, cols)) /
        static_cast<float>(cols);
    Vec squares{};
    for (int64_t c = 0; c < cols; c += kWidth) {
      const Vec d = keep_lanes(load(x + c) - mu, cols - c, Vec{});
      squares += d * d;
    }
    const float r = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(cols) + eps);
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = cols - c;
      const Vec v = load(x + c);
      store_n(normed + at + c, (v - mu) * r * load_n(weight + c, n) + load_n(bias + c, n), n);
      if (summed) store_n(summed + at + c, v, n);
    }
    mean[row] = mu;
    rstd[row] = r;
  }
}

template <class In, class Res, bool kDrop>
void bwd_rows(const NormShape& shape, const In* grad_normed, const Res* grad_summed,
              const In* input, const Res* residual, const float* weight, const float* mean,
              const float* rstd, In* grad_input, Res* grad_residual, float* grad_weight,
              float* grad_bias, Dropout drop, int64_t begin, int64_t end) {
  const int64_t cols = shape.cols;
  const float inverse = 1.0f / static_cast<float>(cols);
  const int64_t padded = round_up(cols, 2 * kWidth);
  float* x = thread_scratch(2 * padded);
  float* weighted = x + padded;
  for (int64_t c = 0; c < cols; ++c) grad_weight[c] = grad_bias[c] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * cols;
    const RowMask mask(drop, row, cols);
    add_row<In, Res, kDrop>(input + at, residual + at, x, cols, mask);
    const float mu = mean[row], r = rstd[row];
    Vec g_sum{}, gx_sum{};
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = cols - c;
      const Vec dy = load_n(grad_normed + at + c, n);
      const Vec normal = (load(x + c) - mu) * r;
      const Vec g = dy * load_n(weight + c, n);
      g_sum += g;
      gx_sum += g * normal;
      store(x + c, normal);
      store(weighted + c, g);
      store_n(grad_weight + c, load_n(grad_weight + c, n) + dy * normal, n);
      store_n(grad_bias + c, load_n(grad_bias + c, n) + dy, n);
    }
    const float g_mean = sum(g_sum) * inverse, gx_mean = sum(gx_sum) * inverse;
    for (int64_t c = 0; c < cols; c += 2 * kWidth) {
      Vec dx[2];
      for (int half = 0; half < 2; ++half) {
        const int64_t h = c + half * kWidth, n = cols - h;
        dx[half] = (load(weighted + h) - g_mean - load(x + h) * gx_mean) * r;
        if (grad_summed) dx[half] += load_n(grad_summed + at + h, n);
        store_n(grad_residual + at + h, dx[half], n);
      }
      if constexpr (kDrop) {
        Vec m0, m1;
        mask.factors(c, m0, m1);
        dx[0] *= m0;
        dx[1] *= m1;
      }
      store_n(grad_input + at + c, dx[0], cols - c);
      store_n(grad_input + at + c + kWidth, dx[1], cols - c - kWidth);
    }
  }
}

// Calls f with the types of input and residual and whether anything drops.
template <class F>
void with_variant(const NormShape& shape, const Dropout& drop, F&& f) {
  with_type(shape.input, [&]<class In>(In*) {
    with_type(shape.residual, [&]<class Res>(Res*) {
      drop.threshold > 0 ? f.template operator()<In, Res, true>()
                         : f.template operator()<In, Res, false>();
    });
  });
}

}  // namespace

void add_layer_norm_fwd(int threads, NormShape shape, const void* input, const void* residual,
                        const float* weight, const float* bias, float eps, void* normed,
                        void* summed, float* mean, float* rstd, Dropout drop) {
  with_variant(shape, drop, [&]<class In, class Res, bool kDrop>() {
    parallel_for(threads, shape.rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
      fwd_rows<In, Res, kDrop>(
          shape, static_cast<const In*>(input), static_cast<const Res*>(residual), weight, bias,
          eps, static_cast<In*>(normed), static_cast<Res*>(summed), mean, rstd, drop, begin, end);
    });
  });
}

void add_layer_norm_bwd(int threads, NormShape shape, const void* grad_normed,
                        const void* grad_summed, const void* input, const void* residual,
                        const float* weight, const float* mean, const float* rstd, void* grad_input,
                        void* grad_residual, float* grad_weight, float* grad_bias, Dropout drop) {
  const int64_t chunks = (shape.rows + kRowsPerChunk - 1) / kRowsPerChunk, cols = shape.cols;
  const Floats partial(2 * chunks * cols);
  float* partial_bias = partial.data + chunks * cols;
  with_variant(shape, drop, [&]<class In, class Res, bool kDrop>() {
    parallel_for(threads, shape.rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
      const int64_t chunk = begin / kRowsPerChunk;
      bwd_rows<In, Res, kDrop>(
          shape, static_cast<const In*>(grad_normed), static_cast<const Res*>(grad_summed),
          static_cast<const In*>(input), static_cast<const Res*>(residual), weight, mean, rstd,
          static_cast<In*>(grad_input), static_cast<Res*>(grad_residual),
          partial.data + chunk * cols, partial_bias + chunk * cols, drop, begin, end);
    });
  });
  sum_partials(threads, partial.data, chunks, cols, grad_weight);
  sum_partials(threads, partial_bias, chunks, cols, grad_bias);
}

}  // namespace uml::UML_ARCH
