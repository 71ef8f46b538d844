// What both ways to train a cell share (head.cpp, head_halves.cpp): its parameters in memory, its
// loss, its logit scales.
#pragma once

#include <cmath>

#include "head_matrix.h"
#include "parallel.h"

namespace uml::UML_ARCH {

constexpr int kMostBranches = 16;
constexpr int64_t kScales = 16;  // floats that as many logit scales take in memory

// Numbers below 1e-38 count as zero while this lives: moments of weights without a gradient decay
// through them, and every operation on one takes 150 cycles.
class TinyIsZero {
#if defined(__SSE2__)
 public:
  TinyIsZero() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
  ~TinyIsZero() { __builtin_ia32_ldmxcsr(before_); }
  TinyIsZero(const TinyIsZero&) = delete;
  TinyIsZero& operator=(const TinyIsZero&) = delete;

 private:
  unsigned before_;
#endif
};

// Memory of a thread, handed out in parts.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : at_(thread_scratch(static_cast<size_t>(floats))) {}
  float* take(int64_t floats) {
    float* part = at_;
    at_ += round_up(floats, 16);
    return part;
  }
  float* take_zeros(int64_t floats) {
    float* part = take(floats);
    std::memset(part, 0, static_cast<size_t>(floats) * sizeof(float));
    return part;
  }

 private:
  float* at_;
};

// A stride for rows of `cols` floats that does not put all of them into the same sets of a cache.
inline int64_t spread(int64_t cols) { return cols % 256 ? cols : cols + 16; }

// logits become the gradient of weight * mean cross-entropy of scale * logits; returns that of
// scale.
inline float cross_entropy_gradient(const HeadBranch& branch, float* logits, int64_t stride,
                                    const int32_t* order, float scale, int64_t classes) {
  float scale_gradient = 0;
  const float factor = branch.weight / static_cast<float>(branch.batch);
  const int64_t cols = round_up(classes, 16);
  for (int64_t i = 0; i < branch.batch; ++i) {
    float* row = logits + i * stride;
    const int32_t label = branch.source.labels[order[i]];
    const float at_label = row[label];
    const auto is_class = [&](int64_t c) { return iota() < static_cast<int32_t>(classes - c); };
    Vec top = splat(-INFINITY);
    for (int64_t c = 0; c < cols; c += kWidth) {
      top = vmax(top, is_class(c) ? load(row + c) * scale : splat(-INFINITY));
    }
    const Vec highest = splat(max(top));
    Vec total{}, weighted{};
    for (int64_t c = 0; c < cols; c += kWidth) {
      const Vec logit = load(row + c);
      const Vec power = is_class(c) ? exp(logit * scale - highest) : Vec{};
      total += power;
      weighted += power * logit;
      store(row + c, power);
    }
    const float share = factor / sum(total);
    for (int64_t c = 0; c < cols; c += kWidth) store(row + c, load(row + c) * (share * scale));
    row[label] -= factor * scale;
    scale_gradient += sum(weighted) * share - at_label * factor;
  }
  return scale_gradient;
}

// Parameters of a cell in memory.
struct Layout {
  int64_t head, end;       // where the head and the first projection begin
  int64_t width, classes;  // of the head
  explicit Layout(const HeadCell& cell, int64_t grid_classes)
      : head(round_up(cell.branch_count, kScales)),
        width(cell.branches[cell.branch_count - 1].source.width),
        classes(round_up(grid_classes, 16)) {
    end = head + width * classes;
  }
};

inline void update_scale(const HeadCell& cell, int64_t i, float gradient, const Adam& adam) {
  alignas(64) float weight[kWidth] = {cell.weights[i]};
  alignas(64) float first[kWidth] = {cell.first[i] / Adam::kFirst};
  alignas(64) float second[kWidth] = {cell.second[i] / Adam::kSecond};
  adam.update(weight, first, second, splat(gradient));
  cell.weights[i] = weight[0];
  cell.first[i] = first[0] * Adam::kFirst;
  cell.second[i] = second[0] * Adam::kSecond;
}

}  // namespace uml::UML_ARCH
