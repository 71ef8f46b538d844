// Linear heads trained by AdamW, one cell of a grid after the other (uml_fast/grid).
//
// A step makes one pass over every matrix (head_matrix.h): it updates with the gradients of this
// step and multiplies with the rows of the next one.
#include <cmath>

#include "head_matrix.h"
#include "kernel_parts.h"
#include "parallel.h"

namespace uml::UML_ARCH {

namespace {

constexpr int kMostBranches = 16;
constexpr int64_t kAhead = 4;    // rows that are asked for before they are read
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
int64_t spread(int64_t cols) { return cols % 256 ? cols : cols + 16; }

// One modality of a cell in training.
struct Lane {
  const HeadBranch* branch;
  int64_t padded;               // rows in panels
  float *rows, *next_rows;      // panels of features
  float *hidden, *next_hidden;  // panels of what the head sees; rows where nothing is projected
  float* logits;                // (padded, stride), then their gradient
  Matrix projection;

  void gather(int64_t step, float* panels) const {
    const int64_t width = branch->source.width, batch = branch->batch;
    const int32_t* order = branch->order + step * batch;
    for (int64_t i = 0; i < batch; ++i) {
      const float* from = branch->source.rows + order[i] * width;
      for (int64_t p = 0; p < width / kPanel; ++p) {
        std::memcpy(panels + (p * padded + i) * kPanel, from + p * kPanel, kPanel * sizeof(float));
      }
    }
  }
};

// logits become the gradient of weight * mean cross-entropy of scale * logits; returns that of
// scale.
float cross_entropy_gradient(const Lane& lane, const int32_t* order, float scale, int64_t classes,
                             int64_t stride) {
  float scale_gradient = 0;
  const HeadBranch& branch = *lane.branch;
  const float factor = branch.weight / static_cast<float>(branch.batch);
  const int64_t cols = round_up(classes, 16);
  for (int64_t i = 0; i < branch.batch; ++i) {
    float* row = lane.logits + i * stride;
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

void update_scale(const HeadCell& cell, int64_t i, float gradient, const Adam& adam) {
  alignas(64) float weight[kWidth] = {cell.weights[i]};
  alignas(64) float first[kWidth] = {cell.first[i] / Adam::kFirst};
  alignas(64) float second[kWidth] = {cell.second[i] / Adam::kSecond};
  adam.update(weight, first, second, splat(gradient));
  cell.weights[i] = weight[0];
  cell.first[i] = first[0] * Adam::kFirst;
  cell.second[i] = second[0] * Adam::kSecond;
}

void train_cell(const HeadGrid& grid, const HeadCell& cell) {
  const Layout layout(cell, grid.classes);
  const int64_t width = layout.width, classes = layout.classes;
  const int64_t stride = spread(classes);
  int64_t floats = (3 * classes + grid.classes) * width, widest = 0;
  for (int64_t i = 0; i < cell.branch_count; ++i) {
    const HeadBranch& branch = cell.branches[i];
    const int64_t padded = round_up(branch.batch, kPanel);
    floats += 2 * padded * branch.source.width + padded * stride;
    floats += padded * kTileVecs * kWidth + 64;
    if (branch.is_projected) floats += (2 * padded + 3 * branch.source.width) * width;
    widest = larger(widest, padded);
  }
  Scratch scratch(floats + widest * width + 256);

  Matrix head{width, classes, scratch.take(3 * width * classes)};
  head.pack(cell.weights + layout.head, cell.first + layout.head, cell.second + layout.head);
  float* transposed = scratch.take(grid.classes * width);
  float* hidden_gradient = scratch.take(widest * width);
  Lane lanes[kMostBranches];
  Use uses[kMostBranches], projected[kMostBranches];
  int64_t at = layout.end;
  bool any_projected = false;
  for (int64_t i = 0; i < cell.branch_count; ++i) {
    const HeadBranch& branch = cell.branches[i];
    Lane& lane = lanes[i];
    lane.branch = &branch;
    lane.padded = round_up(branch.batch, kPanel);
    lane.rows = lane.hidden = scratch.take_zeros(lane.padded * branch.source.width);
    lane.next_rows = lane.next_hidden = scratch.take_zeros(lane.padded * branch.source.width);
    lane.logits = scratch.take(lane.padded * stride);
    uses[i] = {.batch = branch.batch,
               .padded = lane.padded,
               .gradient = lane.logits,
               .gradient_stride = stride,
               .out = lane.logits,
               .out_stride = stride,
               .sums = scratch.take(lane.padded * kTileVecs * kWidth),
               .source = branch.source};
    if (!branch.is_projected) continue;
    any_projected = true;
    lane.hidden = scratch.take(lane.padded * width);
    lane.next_hidden = scratch.take(lane.padded * width);
    lane.projection = {branch.source.width, width, scratch.take(3 * branch.source.width * width)};
    lane.projection.pack(cell.weights + at, cell.first + at, cell.second + at);
    at += branch.source.width * width;
    projected[i] = uses[i];
    projected[i].gradient = hidden_gradient;
    projected[i].gradient_stride = 0;
    projected[i].out_stride = 0;
  }

  // Step -1 is the products of the first rows alone.
  for (int64_t step = -1; step < cell.steps; ++step) {
    const bool has_next = step + 1 < cell.steps, is_backward = step & 1;
    const Adam adam(step < 0 ? 0 : cell.rates[step], cell.weight_decay, cell.begin + step);
    const Adam* updates = step < 0 ? nullptr : &adam;
    if (updates && any_projected) head.transposed(transposed, grid.classes);
    for (int64_t i = 0; i < cell.branch_count; ++i) {
      Lane& lane = lanes[i];
      if (updates) {
        const int32_t* order = lane.branch->order + step * lane.branch->batch;
        const float gradient =
            cross_entropy_gradient(lane, order, cell.weights[i], grid.classes, stride);
        if (cell.learns_scale) update_scale(cell, i, gradient, adam);
      }
      if (has_next) lane.gather(step + 1, lane.next_rows);
      Use& asks = lane.branch->is_projected ? projected[i] : uses[i];
      asks.later = step + 2 < cell.steps ? lane.branch->order + (step + 2) * asks.batch : nullptr;
      if (lane.branch->is_projected) {
        if (updates) {
          product({lane.logits, stride, 1}, transposed, 0, hidden_gradient, 0, lane.padded, width,
                  grid.classes);
        }
        projected[i].rows = lane.rows;
        projected[i].next_rows = lane.next_rows;
        projected[i].out = lane.next_hidden;
        pass(lane.projection, &projected[i], 1, updates, has_next, is_backward);
      }
      uses[i].rows = lane.hidden;
      uses[i].next_rows = lane.next_hidden;
      std::swap(lane.rows, lane.next_rows);
      std::swap(lane.hidden, lane.next_hidden);
    }
    pass(head, uses, cell.branch_count, updates, has_next, is_backward);
  }

  head.unpack(cell.weights + layout.head, cell.first + layout.head, cell.second + layout.head);
  at = layout.end;
  for (int64_t i = 0; i < cell.branch_count; ++i) {
    if (!cell.branches[i].is_projected) continue;
    lanes[i].projection.unpack(cell.weights + at, cell.first + at, cell.second + at);
    at += cell.branches[i].source.width * width;
  }
}

// The target's path as one matrix, and how many held-out samples it gets right.
void look(const HeadGrid& grid, HeadCell& cell) {
  const Layout layout(cell, grid.classes);
  const int64_t classes = layout.classes, width = grid.validation.width;
  const float scale = cell.weights[0];
  const float* head = cell.weights + layout.head;
  if (cell.branches[0].is_projected) {
    product({cell.weights + layout.end, layout.width, 1}, head, classes, cell.folded, classes,
            width, classes, layout.width);
  } else {
    std::memcpy(cell.folded, head, static_cast<size_t>(width * classes) * sizeof(float));
  }
  for (int64_t i = 0; i < width * classes; i += kWidth) {
    store(cell.folded + i, load(cell.folded + i) * scale);
  }
  constexpr int64_t kRows = 32;
  Scratch scratch(kRows * (width + classes) + 64);
  float* rows = scratch.take_zeros(kRows * width);
  float* logits = scratch.take(kRows * classes);
  cell.right = 0;
  for (int64_t begin = 0; begin < cell.held_out_count; begin += kRows) {
    const int64_t count = smaller(kRows, cell.held_out_count - begin);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(rows + i * width, grid.validation.rows + cell.held_out[begin + i] * width,
                  static_cast<size_t>(width) * sizeof(float));
    }
    product({rows, width, 1}, cell.folded, classes, logits, classes, kRows, classes, width);
    for (int64_t i = 0; i < count; ++i) {
      const float* row = logits + i * classes;
      int64_t best = 0;
      for (int64_t c = 1; c < grid.classes; ++c) best = row[c] > row[best] ? c : best;
      cell.right += best == grid.validation.labels[cell.held_out[begin + i]];
    }
  }
}

}  // namespace

void train_heads(int threads, const HeadGrid& grid, HeadCell* cells, int64_t count) {
  parallel_for(threads, count, 1, [&](int64_t from, int64_t to) {
    const TinyIsZero guard;
    for (int64_t i = from; i < to; ++i) {
      if (cells[i].steps > 0) train_cell(grid, cells[i]);
      if (cells[i].folded) look(grid, cells[i]);
    }
  });
}

}  // namespace uml::UML_ARCH
