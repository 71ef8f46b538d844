// Linear heads trained by AdamW with products of bf16 halves (head_halves.h): the steps of a cell.
//
// All modalities are one batch of the head, one after the other. A step makes the gradients of all
// logits, takes those of projected modalities back through the head, then visits every projection
// and at last the head (head_halves_matrix.h), each with the next step's samples.
#include "kernel_parts.h"

#if defined(__AMX_BF16__)

#include "attention_products.h"
#include "head_cell.h"
#include "head_halves_matrix.h"

namespace uml::UML_ARCH {

namespace {

// Parts of one piece of memory; with null it only counts.
struct Memory {
  float* data;
  int64_t floats = 0;

  float* take(int64_t count) {
    float* part = data ? data + floats : nullptr;
    floats += round_up(count, 16);
    return part;
  }
  float* take_zeros(int64_t count) {
    float* part = take(count);
    if (part) std::memset(part, 0, static_cast<size_t>(count) * sizeof(float));
    return part;
  }
  Samples samples(int64_t count, int64_t width) {
    Samples s{count, width, nullptr, nullptr};
    s.rows = take_zeros(s.row_floats());  // those beyond the samples stay zero
    s.columns = take(s.column_floats());
    return s;
  }
  Gradients gradients(int64_t count, int64_t cols) {
    Gradients g{count, cols, nullptr};
    g.tiles = take_zeros(g.floats());
    return g;
  }
  HalvesMatrix matrix(int64_t rows, int64_t cols, bool keeps_halves) {
    HalvesMatrix m{rows, cols, nullptr, nullptr, keeps_halves};
    m.state = take(m.state_floats());
    m.halves = take(m.halves_floats());
    return m;
  }
};

// A projected modality.
struct Lane {
  HalvesMatrix projection;
  Samples samples;
  Gradients gradients;      // of what it makes
  Samples logit_gradients;  // its rows are right operands: words of classes by samples
  float* hidden;            // (whole tiles, stride)
};

// out (count, stride) = gradients @ head transposed.
void multiply_transposed(const HalvesMatrix& head, const Samples& gradients, float* out,
                         int64_t stride) {
  alignas(64) float left[4 * kTileFloats];  // [16 rows of the head][half]
  alignas(64) float sums[4 * kTileFloats];
  const bool is_few = gradients.is_few();
  const auto add = [&]<int kSum>(const float* right) {
    load_tile<6>(right);
    multiply_tiles<kSum, 4, 6>();
    multiply_tiles<kSum, 5, 6>();
  };
  const auto add_halves = [&]<int kSum>(const float* right) {
    load_tile<6>(right);
    load_tile<7>(right + kTileFloats);
    multiply_tiles<kSum, 4, 6>();
    multiply_tiles<kSum, 4, 7>();
    multiply_tiles<kSum, 5, 6>();
  };
  for (int64_t block = 0; block < head.blocks(); ++block) {
    for (int64_t tile = 0; tile < gradients.tiles(); tile += kGroupTiles) {
      const bool has_second = tile + 1 < gradients.tiles();
      clear_tile<0>();
      clear_tile<1>();
      clear_tile<2>();
      clear_tile<3>();
      for (int64_t strip = 0; strip < head.strips(); ++strip) {
        const int64_t cols = head.strip_cols(strip);
        const float* from = head.halves_of(strip) + block * cols * 2 * kTileFloats;
        for (int64_t i = 0; i < 2 * kTileFloats; i += kSide) {
          const Vec first = load(from + i);
          const Vec second = cols == 2 ? load(from + 2 * kTileFloats + i) : Vec{};
          store(left + i, low_words(first, second));
          store(left + 2 * kTileFloats + i, high_words(first, second));
        }
        const float* right = gradients.row_tile(strip, tile);
        load_tile<4>(left);
        load_tile<5>(left + kTileFloats);
        is_few ? add.template operator()<0>(right) : add_halves.template operator()<0>(right);
        if (has_second) add_halves.template operator()<1>(right + 2 * kTileFloats);
        load_tile<4>(left + 2 * kTileFloats);
        load_tile<5>(left + 3 * kTileFloats);
        is_few ? add.template operator()<2>(right) : add_halves.template operator()<2>(right);
        if (has_second) add_halves.template operator()<3>(right + 2 * kTileFloats);
      }
      store_tile<0>(sums, kSide);
      store_tile<1>(sums + kTileFloats, kSide);
      store_tile<2>(sums + 2 * kTileFloats, kSide);
      store_tile<3>(sums + 3 * kTileFloats, kSide);
      for (int64_t sum = 0; sum < 4; ++sum) {
        const int64_t at = block * kBlock + sum / 2 * kSide, first = (tile + sum % 2) * kSide;
        const int64_t lines = smaller(kSide, gradients.count - first);
        if (at >= head.rows || lines <= 0) continue;
        Vec made[kSide];
        for (int64_t i = 0; i < kSide; ++i) made[i] = load(sums + sum * kTileFloats + i * kSide);
        transpose(made);
        for (int64_t i = 0; i < lines; ++i) {
          store(out + (first + i) * stride + at, is_few ? made[i] + made[i + kFew] : made[i]);
        }
      }
    }
  }
}

class HalvesCell {
 public:
  HalvesCell(const HeadGrid& grid, const HeadCell& cell, const float** rows)
      : grid_(grid), cell_(cell), layout_(cell, grid.classes), rows_(rows) {
    for (int64_t i = 0; i < cell.branch_count; ++i) count_ += cell.branches[i].batch;
    head_rows_ = rows_ + count_;
    lay_out(Memory{nullptr});
    lay_out(Memory{thread_scratch(static_cast<size_t>(floats_))});
    load_weights();
  }

  // Step -1 is the products of the first samples alone.
  void step(int64_t step) {
    const bool updates = step >= 0, has_next = step + 1 < cell_.steps, is_backward = step & 1;
    const Adam adam(updates ? cell_.rates[step] : 0, cell_.weight_decay, cell_.begin + step);
    if (has_next) find_rows(step + 1);
    int64_t first = 0;
    for (int64_t i = 0; i < cell_.branch_count; ++i) {
      const HeadBranch& branch = cell_.branches[i];
      float* logits = logits_ + first * stride_;
      if (updates) {
        const float gradient =
            cross_entropy_gradient(branch, logits, stride_, branch.order + step * branch.batch,
                                   cell_.weights[i], grid_.classes);
        if (cell_.learns_scale) update_scale(cell_, i, gradient, adam);
      }
      if (branch.is_projected) {
        Lane& lane = lanes_[i];
        if (updates) take_back(lane, logits);
        if (has_next) lane.samples.pack_rows(rows_ + first);
        pass(lane.projection, lane.samples, lane.gradients, lane.hidden, hidden_stride_, adam,
             updates, has_next, is_backward);
        lane.samples.pack_columns();
      }
      first += branch.batch;
    }
    if (updates) gradients_.pack(logits_, stride_);
    if (has_next) samples_.pack_rows(head_rows());
    pass(head_, samples_, gradients_, logits_, stride_, adam, updates, has_next, is_backward);
    samples_.pack_columns();
  }

  void save_weights() const {
    head_.unpack(cell_.weights + layout_.head, cell_.first + layout_.head,
                 cell_.second + layout_.head);
    each_projection([&](const HalvesMatrix& matrix, int64_t at) {
      matrix.unpack(cell_.weights + at, cell_.first + at, cell_.second + at);
    });
  }

 private:
  void lay_out(Memory memory) {
    const int64_t whole = round_up(count_, kSide);
    stride_ = spread(layout_.classes);
    hidden_stride_ = spread(layout_.width);
    logits_ = memory.take(whole * stride_);
    head_ = memory.matrix(layout_.width, layout_.classes, true);
    samples_ = memory.samples(count_, layout_.width);
    gradients_ = memory.gradients(count_, layout_.classes);
    int64_t widest = 0;
    for (int64_t i = 0; i < cell_.branch_count; ++i) {
      const HeadBranch& branch = cell_.branches[i];
      if (!branch.is_projected) continue;
      const int64_t width = branch.source.width;
      lanes_[i] = {memory.matrix(width, layout_.width, false), memory.samples(branch.batch, width),
                   memory.gradients(branch.batch, layout_.width),
                   memory.samples(branch.batch, layout_.classes),
                   memory.take(round_up(branch.batch, kSide) * hidden_stride_)};
      widest = larger(widest, branch.batch);
    }
    hidden_gradient_ = memory.take(widest * hidden_stride_);
    floats_ = memory.floats;
  }

  template <class F>
  void each_projection(F&& f) const {
    int64_t at = layout_.end;
    for (int64_t i = 0; i < cell_.branch_count; ++i) {
      if (!cell_.branches[i].is_projected) continue;
      f(lanes_[i].projection, at);
      at += cell_.branches[i].source.width * layout_.width;
    }
  }

  void load_weights() const {
    head_.pack(cell_.weights + layout_.head, cell_.first + layout_.head,
               cell_.second + layout_.head);
    each_projection([&](const HalvesMatrix& matrix, int64_t at) {
      matrix.pack(cell_.weights + at, cell_.first + at, cell_.second + at);
    });
  }

  // Rows of all modalities in a step.
  void find_rows(int64_t step) const {
    const float** rows = rows_;
    for (int64_t i = 0; i < cell_.branch_count; ++i) {
      const HeadBranch& branch = cell_.branches[i];
      for (int64_t s = 0; s < branch.batch; ++s) {
        *rows++ = branch.source.rows + branch.order[step * branch.batch + s] * branch.source.width;
      }
    }
  }

  // What the head sees of every sample.
  const float* const* head_rows() const {
    int64_t at = 0;
    for (int64_t i = 0; i < cell_.branch_count; ++i) {
      const HeadBranch& branch = cell_.branches[i];
      for (int64_t s = 0; s < branch.batch; ++s, ++at) {
        head_rows_[at] = branch.is_projected ? lanes_[i].hidden + s * hidden_stride_ : rows_[at];
      }
    }
    return head_rows_;
  }

  // Gradients of what a projection makes, from those of its logits.
  void take_back(const Lane& lane, const float* logits) const {
    const int64_t count = lane.logit_gradients.count;
    for (int64_t s = 0; s < count; ++s) head_rows_[s] = logits + s * stride_;
    lane.logit_gradients.pack_rows(head_rows_);
    lane.logit_gradients.transpose_rows();
    multiply_transposed(head_, lane.logit_gradients, hidden_gradient_, hidden_stride_);
    lane.gradients.pack(hidden_gradient_, hidden_stride_);
  }

  const HeadGrid& grid_;
  const HeadCell& cell_;
  const Layout layout_;
  int64_t count_ = 0;  // samples of all modalities in a step
  int64_t floats_ = 0, stride_ = 0, hidden_stride_ = 0;
  const float **rows_, **head_rows_;  // of the next step
  float* logits_;                     // (whole tiles, stride), then their gradient
  float* hidden_gradient_;
  HalvesMatrix head_;
  Samples samples_;  // of the head
  Gradients gradients_;
  Lane lanes_[kMostBranches];
};

}  // namespace

void train_cell_in_halves(const HeadGrid& grid, const HeadCell& cell) {
  const ProductScope<Pairs> scope;
  int64_t count = 0;
  for (int64_t i = 0; i < cell.branch_count; ++i) count += cell.branches[i].batch;
  const Array<const float*> rows(2 * count);
  HalvesCell trained(grid, cell, rows.data);
  for (int64_t step = -1; step < cell.steps; ++step) trained.step(step);
  trained.save_weights();
}

}  // namespace uml::UML_ARCH

#endif
