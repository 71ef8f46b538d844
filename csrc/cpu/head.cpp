// Linear heads trained by AdamW, one cell of a grid after the other (uml_fast/grid).
//
// A step makes one pass over every matrix (head_matrix.h): it updates with the gradients of this
// step and multiplies with the rows of the next one.
#include "head_cell.h"
#include "kernel_parts.h"

namespace uml::UML_ARCH {

namespace {

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
        const float gradient = cross_entropy_gradient(*lane.branch, lane.logits, stride, order,
                                                      cell.weights[i], grid.classes);
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

void train_steps(const HeadGrid& grid, const HeadCell& cell) {
#if defined(__AMX_BF16__)
  if (grid.may_halve) return train_cell_in_halves(grid, cell);
#endif
  train_cell(grid, cell);
}

// How many of `count` samples, those of `order` or the first ones, a folded matrix gets right.
int64_t count_right(const HeadSource& source, const int32_t* order, int64_t count,
                    const float* folded, int64_t classes) {
  constexpr int64_t kRows = 32;
  const int64_t width = source.width, cols = round_up(classes, 16);
  Scratch scratch(kRows * (width + cols) + 64);
  float* rows = scratch.take_zeros(kRows * width);
  float* logits = scratch.take(kRows * cols);
  int64_t right = 0;
  for (int64_t begin = 0; begin < count; begin += kRows) {
    const auto sample = [&](int64_t i) { return order ? order[begin + i] : begin + i; };
    const int64_t some = smaller(kRows, count - begin);
    for (int64_t i = 0; i < some; ++i) {
      std::memcpy(rows + i * width, source.rows + sample(i) * width,
                  static_cast<size_t>(width) * sizeof(float));
    }
    product({rows, width, 1}, folded, cols, logits, cols, kRows, cols, width);
    for (int64_t i = 0; i < some; ++i) {
      const float* row = logits + i * cols;
      int64_t best = 0;
      for (int64_t c = 1; c < classes; ++c) best = row[c] > row[best] ? c : best;
      right += best == source.labels[sample(i)];
    }
  }
  return right;
}

// The target's path as one matrix, and how many held-out samples it gets right.
void look(const HeadGrid& grid, HeadCell& cell) {
  const Layout layout(cell, grid.classes);
  const int64_t classes = layout.classes, width = grid.validation.width;
  const float* head = cell.weights + layout.head;
  if (cell.branches[0].is_projected) {
    product({cell.weights + layout.end, layout.width, 1}, head, classes, cell.folded, classes,
            width, classes, layout.width);
  } else {
    std::memcpy(cell.folded, head, static_cast<size_t>(width * classes) * sizeof(float));
  }
  for (int64_t i = 0; i < width * classes; i += kWidth) {
    store(cell.folded + i, load(cell.folded + i) * cell.weights[0]);
  }
  cell.right =
      count_right(grid.validation, cell.held_out, cell.held_out_count, cell.folded, grid.classes);
}

}  // namespace

void train_heads(int threads, const HeadGrid& grid, HeadCell* cells, int64_t count) {
  parallel_for(threads, count, 1, [&](int64_t from, int64_t to) {
    const TinyIsZero guard;
    for (int64_t i = from; i < to; ++i) {
      if (cells[i].steps > 0) train_steps(grid, cells[i]);
      if (cells[i].folded) look(grid, cells[i]);
    }
  });
}

void test_heads(int threads, const HeadSource& source, int64_t samples, int64_t classes,
                const float* const* folded, int64_t count, int64_t* right) {
  parallel_for(threads, count, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      right[i] = count_right(source, nullptr, samples, folded[i], classes);
    }
  });
}

}  // namespace uml::UML_ARCH
