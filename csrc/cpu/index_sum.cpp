// Sums of the rows that share an index: the gradient of a table that rows were gathered from.
#include "kernel_parts.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

constexpr int kVectors = 4;  // accumulators of one column block
constexpr int64_t kColumns = kVectors * kWidth;

UML_INLINE int32_t clamped(int32_t index, int64_t size) {
  return static_cast<int32_t>(larger(0, smaller(index, size - 1)));
}

// Rows by index, in their order within one: those of entry p are order[start[p]] to
// order[start[p + 1] - 1].
void sort_rows(const int32_t* index, int64_t rows, int64_t size, int32_t* start, int32_t* order) {
  for (int64_t p = 0; p <= size; ++p) start[p] = 0;
  for (int64_t row = 0; row < rows; ++row) ++start[clamped(index[row], size)];
  int32_t end = 0;
  for (int64_t p = 0; p <= size; ++p) start[p] = end += start[p];
  for (int64_t row = rows; row-- > 0;) {
    order[--start[clamped(index[row], size)]] = static_cast<int32_t>(row);
  }
}

// Sums of one column block, `cols` columns of it or all if kWhole.
template <class T, bool kWhole>
UML_INLINE void sum_entry(const T* input, const int32_t* first, const int32_t* last, int64_t stride,
                          int64_t cols, float* out) {
  Vec total[kVectors] = {};
  for (; first < last; ++first) {
    const T* row = input + *first * stride;
    for (int i = 0; i < kVectors; ++i) {
      total[i] += kWhole ? load(row + i * kWidth) : load_n(row + i * kWidth, cols - i * kWidth);
    }
  }
  for (int i = 0; i < kVectors; ++i) store_n(out + i * kWidth, total[i], cols - i * kWidth);
}

}  // namespace

void index_sum(int threads, DType dtype, const void* input, const int32_t* index, int64_t rows,
               int64_t cols, int64_t size, float* out) {
  if (size == 0) return;
  prefer_huge_pages(out, sizeof(float) * static_cast<size_t>(size * cols));
  const Array<int32_t> start(size + 1), order(rows);
  sort_rows(index, rows, size, start.data, order.data);
  const int64_t blocks = (cols + kColumns - 1) / kColumns;
  with_type(dtype, [&]<class T>(T*) {
    // One entry and column block per item, so that work is shared even if all rows have one index.
    parallel_for(threads, size * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t p = item / blocks, c = item % blocks * kColumns;
        const T* in = static_cast<const T*>(input) + c;
        const int32_t *first = order.data + start.data[p], *last = order.data + start.data[p + 1];
        float* o = out + p * cols + c;
        if (cols - c >= kColumns) {
          sum_entry<T, true>(in, first, last, cols, kColumns, o);
        } else {
          sum_entry<T, false>(in, first, last, cols, cols - c, o);
        }
      }
    });
  });
}

}  // namespace uml::UML_ARCH
