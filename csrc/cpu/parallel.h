// Parallel loops and per-thread scratch memory for the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace uml {

// A loop body: handles items [begin, end).
using RangeBody = void (*)(void* context, int64_t begin, int64_t end);

// Runs body over [0, items) in chunks of `grain` on up to `threads` threads, the caller among them,
// and returns when all are done. Chunks do not depend on `threads`, which thread takes which one is
// undefined. Bodies must not throw. Runs inline for one thread or one chunk.
void parallel_for(int threads, int64_t items, int64_t grain, RangeBody body, void* context);

template <class Body>
void parallel_for(int threads, int64_t items, int64_t grain, Body&& body) {
  auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<Body*>(context))(begin, end);
  };
  parallel_for(threads, items, grain, +call, &body);
}

// Makes parallel_for run on the OpenMP threads of the caller's process: `address` is its
// GOMP_parallel, 0 for the own pool. PyTorch's idle OpenMP workers spin for milliseconds, so a
// second pool would compete with them for cores. Call before the first parallel_for.
void use_openmp(std::uintptr_t address);

// At least `floats` floats of 64-byte aligned memory owned by the calling thread, valid until its
// next call. Ends the process with a message if there is none: loop bodies cannot throw.
float* thread_scratch(size_t floats);

}  // namespace uml
