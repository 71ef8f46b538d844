// Mean of the rows of each segment, and its gradient.
#include "kernel_parts.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {

void segment_mean_fwd(int threads, DType dtype, const void* input, const int32_t* offsets,
                      int64_t segments, int64_t cols, void* out) {
  with_type(dtype, [&]<class T>(T*) {
    const T* in = static_cast<const T*>(input);
    parallel_for(threads, segments, 8, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = offsets[s], last = offsets[s + 1];
        const float inverse = last > first ? 1.0f / static_cast<float>(last - first) : 0.0f;
        for (int64_t c = 0; c < cols; c += kWidth) {
          Vec total{};
          for (int64_t row = first; row < last; ++row)
            total += load_n(in + row * cols + c, cols - c);
          store_n(static_cast<T*>(out) + s * cols + c, total * inverse, cols - c);
        }
      }
    });
  });
}

void segment_mean_bwd(int threads, DType dtype, const void* grad_out, const int32_t* offsets,
                      int64_t segments, int64_t cols, void* grad_input) {
  with_type(dtype, [&]<class T>(T*) {
    const T* grad = static_cast<const T*>(grad_out);
    parallel_for(threads, segments, 8, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = offsets[s], last = offsets[s + 1];
        if (first == last) continue;
        const float inverse = 1.0f / static_cast<float>(last - first);
        for (int64_t c = 0; c < cols; c += kWidth) {
          const Vec g = load_n(grad + s * cols + c, cols - c) * inverse;
          for (int64_t row = first; row < last; ++row) {
            store_n(static_cast<T*>(grad_input) + row * cols + c, g, cols - c);
          }
        }
      }
    });
  });
}

}  // namespace uml::UML_ARCH
