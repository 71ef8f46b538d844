// The weight gradient of a linear layer in bf16: grad^T input over T rows, summed and written in
// fp32. With matrix tiles alone; elsewhere PyTorch's product is used (see has_weight_gradient).
//
// Both operands are packed, since T, the long dimension, is the strided one of each: the narrow one
// whole, the wide one a slice of columns at a time, as much of T as stays in the second-level cache
// with the slice's sums.
#include "attention_operands.h"
#include "kernel_parts.h"
#include "parallel.h"

namespace uml::UML_ARCH {

#if defined(__AMX_BF16__)
namespace {

// A pair of panels of it, as many rows of the narrow operand and four tiles of sums lie in the
// first-level cache.
constexpr int64_t kRowsPerBlock = 256;
// Of a slice; of a result narrower than two, half as many, so that two threads have work.
constexpr int64_t kColsPerTask = 192;

}  // namespace

bool has_weight_gradient() { return true; }

void weight_gradient(int threads, const void* grad, const void* input, int64_t rows,
                     int64_t grad_cols, int64_t input_cols, float* out) {
  // narrow^T wide has the wide operand's columns as its own, which is the result or its transpose.
  if (rows == 0) {
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(grad_cols * input_cols));
    return;
  }
  const bool is_transposed = grad_cols > input_cols;
  const bf16* narrow = static_cast<const bf16*>(is_transposed ? input : grad);
  const bf16* wide = static_cast<const bf16*>(is_transposed ? grad : input);
  const int64_t m = is_transposed ? input_cols : grad_cols;
  const int64_t n = is_transposed ? grad_cols : input_cols;
  const int64_t depth = round_up(m, kWidth);
  const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  const auto rows_of = [&](int64_t block) {
    return smaller(kRowsPerBlock, rows - block * kRowsPerBlock);
  };
  const Floats packed(blocks * depth * (kRowsPerBlock / 2));
  const auto packed_block = [&](int64_t block) {
    return packed.data + block * depth * (kRowsPerBlock / 2);
  };
  parallel_for(threads, blocks, 1, [&](int64_t begin, int64_t) {
    Pack<Pairs>::columns(Matrix<bf16>{narrow + begin * kRowsPerBlock * m, m, rows_of(begin), m},
                         packed_block(begin), nullptr);
  });
  const int64_t cols_per_task = n < 2 * kColsPerTask ? kColsPerTask / 2 : kColsPerTask;
  parallel_for(threads, n, cols_per_task, [&](int64_t begin, int64_t end) {
    const ProductScope<Pairs> scope;
    const int64_t cols = end - begin, panels = (cols + kWidth - 1) / kWidth;
    const int64_t slice_words = panels * kWidth * (kRowsPerBlock / 2);
    float* slice = thread_scratch(slice_words + panels * kWidth * depth);
    float* sums = slice + slice_words;
    for (int64_t block = 0; block < blocks; ++block) {
      const Matrix<bf16> from{wide + block * kRowsPerBlock * n + begin, n, rows_of(block), cols};
      Pack<Pairs>::panels(from, slice);
      const Operand left{packed_block(block), kWidth, 1, depth * kWidth};
      const int64_t k = words<Pairs>(from.rows), panel = padded_words<Pairs>(from.rows) * kWidth;
      const int64_t sums_panel = depth * kWidth;
      if (block == 0) {
        product<Pairs, false>(m, panels, k, left, slice, panel, sums, sums_panel);
      } else {
        product<Pairs, true>(m, panels, k, left, slice, panel, sums, sums_panel);
      }
    }
    if (is_transposed) {
      write_transposed(sums, depth, nullptr, cols, m, out + begin * m, m);
    } else {
      write_rows(sums, depth, m, cols, out + begin, n);
    }
  });
}
#else
bool has_weight_gradient() { return false; }
void weight_gradient(int, const void*, const void*, int64_t, int64_t, int64_t, float*) {}
#endif

}  // namespace uml::UML_ARCH
