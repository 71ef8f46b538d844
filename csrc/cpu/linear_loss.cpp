// The pass between the products of a linear loss: predictions become their gradient in place, and
// the chunk's error and column sums (the gradient of the bias) are added up.
#include "kernel_parts.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

// Rows of one task, and the granularity of partial sums.
constexpr int64_t kRowsPerChunk = 32;

template <class T>
UML_INLINE void clear_row(T* row, int64_t cols) {
  for (int64_t c = 0; c < cols; c += kWidth) store_n(row + c, Vec{}, cols - c);
}

// Gradients are those of the sum of errors: the caller weighs them once the rows are counted.
template <class P, class Target, bool kGrad>
double squared_error_rows(const LossChunk& chunk, const float* bias, const Target* target,
                          float* sums, int64_t begin, int64_t end) {
  const int64_t cols = chunk.cols;
  // Lanes are added up once each has a few hundred squares: seldom for narrow rows, and with the
  // rounding error of short sums for wide ones.
  const int64_t rows_per_sum = larger(256 * kWidth / cols, 1);
  double total = 0;
  Vec squares{};
  for (int64_t row = begin; row < end; ++row) {
    P* p = static_cast<P*>(chunk.product) + row * cols;
    if ((row - begin) % rows_per_sum == 0) {
      total += sum(squares);
      squares = Vec{};
    }
    if (!chunk.counts[row]) {
      if constexpr (kGrad) clear_row(p, cols);
      continue;
    }
    const Target* t = target + row * cols;
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = cols - c;
      const Vec error = load_n(p + c, n) + load_n(bias + c, n) - load_n(t + c, n);
      squares += error * error;
      if constexpr (kGrad) {
        const Vec grad = error + error;
        store_n(p + c, grad, n);
        store_n(sums + c, load_n(sums + c, n) + grad, n);
      }
    }
  }
  return total + sum(squares);
}

// Largest of logits + bias, NaN where one of them is NaN.
template <class P>
UML_INLINE float largest(const P* logits, const float* bias, int64_t cols) {
  Vec most = splat(-__builtin_inff());
  VecI is_nan{};
  int64_t c = 0;
  for (; c + kWidth <= cols; c += kWidth) {
    const Vec x = load(logits + c) + load(bias + c);
    is_nan |= x != x;
    most = vmax(most, x);
  }
  if (c < cols) {
    const int64_t n = cols - c;
    const Vec x = load_n(logits + c, n) + load_n(bias + c, n);
    is_nan |= x != x;
    most = vmax(most, iota() < static_cast<int32_t>(n) ? x : most);
  }
  return sum(is_nan ? splat(1) : Vec{}) > 0 ? __builtin_nanf("") : max(most);
}

template <class P, class Id, bool kGrad>
double cross_entropy_rows(const LossChunk& chunk, const float* bias, const Id* ids, float* sums,
                          int64_t begin, int64_t end) {
  const int64_t cols = chunk.cols;
  float* e = thread_scratch(round_up(cols, kWidth));
  double total = 0;
  for (int64_t row = begin; row < end; ++row) {
    P* p = static_cast<P*>(chunk.product) + row * cols;
    if (!chunk.counts[row]) {
      if constexpr (kGrad) clear_row(p, cols);
      continue;
    }
    const int64_t id = ids[row];
    const float most = largest(p, bias, cols);
    const float picked = load_n(p + id, 1)[0] + bias[id];
    Vec masses{};
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = cols - c;
      Vec mass = exp(load_n(p + c, n) + load_n(bias + c, n) - most);
      if (n < kWidth) mass = iota() < static_cast<int32_t>(n) ? mass : Vec{};
      masses += mass;
      if constexpr (kGrad) store(e + c, mass);
    }
    const float mass = sum(masses);
    total += static_cast<double>(__builtin_logf(mass)) + most - picked;
    if constexpr (kGrad) {
      const float scale = 1.0f / mass;
      // In e, so that sums and stored gradient come from the same unrounded values.
      e[id] -= mass;
      for (int64_t c = 0; c < cols; c += kWidth) {
        const int64_t n = cols - c;
        const Vec grad = load(e + c) * scale;
        store_n(p + c, grad, n);
        store_n(sums + c, load_n(sums + c, n) + grad, n);
      }
    }
  }
  return total;
}

// Calls rows(partial sums of columns or null, begin, end) -> error over all rows and adds what it
// finds in order.
template <class Rows>
void add_up(int threads, const LossChunk& chunk, Rows&& rows) {
  const int64_t tasks = (chunk.rows + kRowsPerChunk - 1) / kRowsPerChunk, cols = chunk.cols;
  const int64_t width = chunk.bias_grad ? cols : 0;
  const Floats partial((tasks + 1) * width);
  double* errors = new double[tasks];
  parallel_for(threads, chunk.rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
    const int64_t task = begin / kRowsPerChunk;
    float* sums = partial.data + task * width;
    for (int64_t c = 0; c < width; ++c) sums[c] = 0;
    errors[task] = rows(sums, begin, end);
  });
  for (int64_t i = 0; i < tasks; ++i) chunk.totals[0] += errors[i];
  delete[] errors;
  int64_t counted = 0;
  for (int64_t row = 0; row < chunk.rows; ++row) counted += chunk.counts[row];
  chunk.totals[1] += static_cast<double>(counted);
  if (chunk.bias_grad) {
    for (int64_t c = 0; c < cols; ++c) partial.data[tasks * width + c] = chunk.bias_grad[c];
    sum_partials(threads, partial.data, tasks + 1, cols, chunk.bias_grad);
  }
}

}  // namespace

void squared_error(int threads, LossChunk chunk, const float* bias, DType target_dtype,
                   const void* target) {
  with_type(chunk.dtype, [&]<class P>(P*) {
    with_type(target_dtype, [&]<class Target>(Target*) {
      const Target* t = static_cast<const Target*>(target);
      add_up(threads, chunk, [&](float* sums, int64_t begin, int64_t end) {
        return chunk.bias_grad
                   ? squared_error_rows<P, Target, true>(chunk, bias, t, sums, begin, end)
                   : squared_error_rows<P, Target, false>(chunk, bias, t, sums, begin, end);
      });
    });
  });
}

void cross_entropy(int threads, LossChunk chunk, const float* bias, bool ids_are_64_bit,
                   const void* ids) {
  with_type(chunk.dtype, [&]<class P>(P*) {
    auto run = [&]<class Id>(const Id* id) {
      add_up(threads, chunk, [&](float* sums, int64_t begin, int64_t end) {
        return chunk.bias_grad
                   ? cross_entropy_rows<P, Id, true>(chunk, bias, id, sums, begin, end)
                   : cross_entropy_rows<P, Id, false>(chunk, bias, id, sums, begin, end);
      });
    };
    ids_are_64_bit ? run(static_cast<const int64_t*>(ids)) : run(static_cast<const int32_t*>(ids));
  });
}

}  // namespace uml::UML_ARCH
