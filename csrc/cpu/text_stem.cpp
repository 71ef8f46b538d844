// Tokens of text: rows of an embedding table plus rows of a position table. Their gradients are
// sums of rows by index (index_sum.cpp).
#include "kernel_parts.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

constexpr int64_t kRowsPerChunk = 64;

}  // namespace

void text_stem_fwd(int threads, TextShape shape, const int32_t* ids, const void* weight,
                   const void* position, const int32_t* position_index, void* out) {
  const int64_t cols = shape.cols, last = shape.positions - 1;
  with_type(shape.weight, [&]<class W>(W*) {
    with_type(shape.position, [&]<class P>(P*) {
      with_type(shape.out, [&]<class T>(T*) {
        prefer_huge_pages(out, sizeof(T) * static_cast<size_t>(shape.rows * cols));
        parallel_for(threads, shape.rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            const W* w = static_cast<const W*>(weight) + ids[row] * cols;
            T* o = static_cast<T*>(out) + row * cols;
            if (position == nullptr) {
              for (int64_t c = 0; c < cols; c += kWidth)
                store_n(o + c, load_n(w + c, cols - c), cols - c);
              continue;
            }
            const int64_t at = larger(smaller(position_index[row], last), 0);
            const P* p = static_cast<const P*>(position) + at * cols;
            for (int64_t c = 0; c < cols; c += kWidth)
              store_n(o + c, load_n(w + c, cols - c) + load_n(p + c, cols - c), cols - c);
          }
        });
      });
    });
  });
}

}  // namespace uml::UML_ARCH
