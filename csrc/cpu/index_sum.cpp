// Sums of the rows that share an index: the gradient of a table that rows were gathered from.
#include "kernel_parts.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

constexpr int kVectors = 4;  // accumulators of one column block
constexpr int64_t kColumns = kVectors * kWidth;

// With 4 items a chunk, 30,522 x 64 spent half its time in the counter that hands them out.
constexpr int64_t kItemsPerChunk = 16;
constexpr int64_t kEntriesPerChunk = 512;

UML_INLINE int32_t clamped(int32_t index, int64_t size) {
  return static_cast<int32_t>(larger(0, smaller(index, size - 1)));
}

// Rows by index, in their order within one: those of entry p are order[start[p]] to
// order[start[p + 1] - 1]. Lists the entries that have rows and returns their number.
int64_t sort_rows(const int32_t* index, int64_t rows, int64_t size, int32_t* start, int32_t* order,
                  int32_t* found) {
  std::memset(start, 0, sizeof(int32_t) * static_cast<size_t>(size + 1));
  for (int64_t row = 0; row < rows; ++row) ++start[clamped(index[row], size)];
  int32_t end = 0;
  int64_t entries = 0;
  for (int64_t p = 0; p < size; ++p) {
    const int32_t count = start[p];
    start[p] = end += count;
    found[entries] = static_cast<int32_t>(p);
    entries += count != 0;
  }
  start[size] = end;
  for (int64_t row = rows; row-- > 0;) {
    order[--start[clamped(index[row], size)]] = static_cast<int32_t>(row);
  }
  return entries;
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

// Zeros in the entries from `begin` to `end` that have no rows.
void clear_entries(const int32_t* start, int64_t begin, int64_t end, int64_t cols, float* out) {
  for (int64_t p = begin; p < end;) {
    int64_t next = p;
    while (next < end && start[next] == start[next + 1]) ++next;
    std::memset(out + p * cols, 0, sizeof(float) * static_cast<size_t>((next - p) * cols));
    p = next + 1;
  }
}

}  // namespace

void index_sum(int threads, DType dtype, const void* input, const int32_t* index, int64_t rows,
               int64_t cols, int64_t size, float* out) {
  if (size == 0) return;
  const Array<int32_t> start(size + 1), order(rows), found(smaller(rows, size) + 1);
  const int64_t entries = sort_rows(index, rows, size, start.data, order.data, found.data);
  const bool is_zero = zero_by_pages(out, sizeof(float) * static_cast<size_t>(size * cols));
  if (!is_zero && entries < size) {
    parallel_for(threads, size, kEntriesPerChunk, [&](int64_t begin, int64_t end) {
      clear_entries(start.data, begin, end, cols, out);
    });
  }
  const int64_t blocks = (cols + kColumns - 1) / kColumns;
  with_type(dtype, [&]<class T>(T*) {
    // One entry and column block per item, so that work is shared even if all rows have one index.
    parallel_for(threads, entries * blocks, kItemsPerChunk, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t p = found.data[item / blocks], c = item % blocks * kColumns;
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
