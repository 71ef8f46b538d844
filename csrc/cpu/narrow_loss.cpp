// A linear layer of few inputs and outputs with its squared error, all in one pass over the rows:
// the three products are so small that calls of a library cost more than they do.
#include "attention_operands.h"
#include "kernel_parts.h"
#include "parallel.h"

namespace uml::UML_ARCH {
namespace {

constexpr int64_t kBlockRows = 64;

// A task has one partial sum of the weight's gradient; few tasks keep those small.
constexpr int64_t kLeastTaskRows = 256, kMostTasks = 32;

// The weight as B operands: W^T makes predictions of hidden, W its gradient of theirs.
template <class Op, class T>
struct Weight {
  const int64_t width, features, padded_width, padded_features;
  const Array<float> to_features, to_width;

  explicit Weight(const NarrowLoss& loss)
      : width(loss.width),
        features(loss.features),
        padded_width(round_up(width, kWidth)),
        padded_features(round_up(features, kWidth)),
        to_features(padded_features * padded_words<Op>(width)),
        to_width(padded_width * padded_words<Op>(features)) {
    const Matrix<T> weight{static_cast<const T*>(loss.weight), width, features, width};
    Pack<Op>::transposed(weight, to_features.data);
    Pack<Op>::panels(weight, to_width.data);
  }
  int64_t partial_size() const { return padded_features * (padded_width + 1); }
};

// Errors of `rows` rows from `first` on; predictions in panels become gradients of the sum of
// errors, rows of padded_features.
template <class T, class Target>
double error_rows(const NarrowLoss& loss, int64_t first, int64_t rows, int64_t padded_features,
                  const float* predictions, T* grads, float* bias_sums) {
  const int64_t features = loss.features;
  const auto* target = static_cast<const Target*>(loss.target) + first * features;
  double total = 0;
  for (int64_t c = 0; c < features; c += kWidth) {
    const int64_t n = features - c;
    const Vec bias = load_n(loss.bias + c, n);
    Vec squares{}, sums[2] = {};  // of even and odd rows: shorter sums round less
    for (int64_t r = 0; r < rows; ++r) {
      Vec error{};
      if (loss.counts[first + r]) {
        error = load(predictions + c * kBlockRows + r * kWidth) + bias -
                load_n(target + r * features + c, n);
        squares += error * error;
        sums[r % 2] += error;
      }
      store(grads + r * padded_features + c, error + error);
    }
    total += sum(squares);
    store(bias_sums + c, load(bias_sums + c) + 2.0f * (sums[0] + sums[1]));
  }
  return total;
}

// One task: rows from `begin` to `end`. partial: the weight's gradient in panels, then that of the
// bias.
template <class Op, class T, class Target>
double run_task(const NarrowLoss& loss, const Weight<Op, T>& weight, float* partial, int64_t begin,
                int64_t end) {
  const int64_t width = weight.width, features = weight.features;
  const int64_t padded_width = weight.padded_width, padded_features = weight.padded_features;
  const int64_t sizes[] = {Pack<Op>::rows_words(kBlockRows, width),
                           padded_features * kBlockRows,
                           padded_features * kBlockRows,
                           Pack<Op>::rows_words(kBlockRows, features),
                           padded_width * kBlockRows,
                           Pack<Op>::columns_words(kBlockRows, features),
                           padded_width * padded_words<Op>(kBlockRows)};
  int64_t total = 0;
  for (const int64_t size : sizes) total += round_up(size, kWidth);
  float* arrays[7];
  arrays[0] = thread_scratch(static_cast<size_t>(total));
  for (int i = 1; i < 7; ++i) arrays[i] = arrays[i - 1] + round_up(sizes[i - 1], kWidth);
  const auto [hidden_words, predictions, grad_rows, grad_words, grad_hidden, grad_columns,
              hidden_panels] = arrays;
  T* grads = reinterpret_cast<T*>(grad_rows);
  const int64_t features_depth = padded_words<Op>(features) * kWidth;
  const int64_t width_depth = padded_words<Op>(width) * kWidth;
  float* bias_sums = partial + padded_features * padded_width;
  for (int64_t i = 0; i < weight.partial_size(); ++i) partial[i] = 0;
  double error = 0;
  [[maybe_unused]] const ProductScope<Op> scope;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int64_t rows = smaller(kBlockRows, end - row);
    const Matrix<T> hidden{static_cast<const T*>(loss.hidden) + row * width, width, rows, width};
    product<Op, false>(rows, padded_features / kWidth, words<Op>(width),
                       Pack<Op>::rows(hidden, hidden_words), weight.to_features.data, width_depth,
                       predictions, kBlockRows * kWidth);
    error += error_rows<T, Target>(loss, row, rows, padded_features, predictions, grads, bias_sums);
    const Matrix<T> grad{grads, padded_features, rows, features};
    const Operand by_row = Pack<Op>::rows(grad, grad_words);
    if (loss.grad_hidden) {
      product<Op, false>(rows, padded_width / kWidth, words<Op>(features), by_row,
                         weight.to_width.data, features_depth, grad_hidden, kBlockRows * kWidth);
      write_rows(grad_hidden, kBlockRows, rows, width,
                 static_cast<T*>(loss.grad_hidden) + row * width, width);
    }
    if (loss.grad_weight) {
      Pack<Op>::panels(hidden, hidden_panels);
      product<Op, true>(features, padded_width / kWidth, words<Op>(rows),
                        Pack<Op>::columns(grad, grad_columns, &by_row), hidden_panels,
                        padded_words<Op>(rows) * kWidth, partial, padded_features * kWidth);
    }
  }
  return error;
}

template <class T, class Target>
void run(int threads, const NarrowLoss& loss) {
  using Op = OpOf<T>;
  const Weight<Op, T> weight(loss);
  const int64_t share = (loss.rows + kMostTasks - 1) / kMostTasks;
  const int64_t task_rows = larger(kLeastTaskRows, round_up(share, kBlockRows));
  const int64_t tasks = (loss.rows + task_rows - 1) / task_rows, size = weight.partial_size();
  const Floats partial((tasks + 1) * size);
  const Array<double> errors(tasks);
  parallel_for(threads, loss.rows, task_rows, [&](int64_t begin, int64_t end) {
    const int64_t task = begin / task_rows;
    errors.data[task] =
        run_task<Op, T, Target>(loss, weight, partial.data + task * size, begin, end);
  });
  for (int64_t task = 0; task < tasks; ++task) loss.totals[0] += errors.data[task];
  for (int64_t row = 0; row < loss.rows; ++row) loss.totals[1] += loss.counts[row];
  if (!loss.grad_weight) return;
  float* sums = partial.data + tasks * size;
  sum_partials(threads, partial.data, tasks, size, sums);
  write_rows(sums, weight.padded_features, loss.features, loss.width, loss.grad_weight, loss.width);
  std::memcpy(loss.grad_bias, sums + weight.padded_features * weight.padded_width,
              sizeof(float) * static_cast<size_t>(loss.features));
}

}  // namespace

void narrow_squared_error(int threads, const NarrowLoss& loss) {
  with_type(loss.dtype, [&]<class T>(T*) {
    with_type(loss.target_dtype, [&]<class Target>(Target*) { run<T, Target>(threads, loss); });
  });
}

}  // namespace uml::UML_ARCH
