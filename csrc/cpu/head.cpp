// Linear heads trained by AdamW, one cell of a grid after the other (uml_fast/grid).
//
// A step is written for weights that stay in the second-level cache: gradients are made tile by
// tile in registers and used up there by the optimiser, so they never reach memory.
#include <cmath>

#include "kernel_parts.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {

namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 8;
constexpr int kTileVecs = 3;
#else
constexpr int kTileRows = 4;
constexpr int kTileVecs = 2;
#endif

// A matrix read as (row, k) with any two strides.
struct Left {
  const float* data;
  int64_t row_stride;
  int64_t k_stride;
};

// total += sum over k of left[row, k] * right[k, column ...].
template <int kRows, int kVecs>
UML_INLINE void multiply(Vec (&total)[kRows][kVecs], Left left, const float* right,
                         int64_t right_stride, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[kVecs];
    for (int j = 0; j < kVecs; ++j) b[j] = load(right + j * kWidth);
    for (int i = 0; i < kRows; ++i) {
      const Vec a = splat(left.data[i * left.row_stride]);
      for (int j = 0; j < kVecs; ++j) total[i][j] += a * b[j];
    }
    left.data += left.k_stride;
    right += right_stride;
  }
}

template <int kVecs, class F>
UML_INLINE void for_rows(int64_t rows, int64_t column, F&& f) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    f.template operator()<kTileRows, kVecs>(row, column);
  }
  for (; row < rows; ++row) f.template operator()<1, kVecs>(row, column);
}

// Calls f<rows, vectors>(row, column) for tiles that cover (rows, cols); cols is a multiple of
// kWidth.
template <class F>
UML_INLINE void for_tiles(int64_t rows, int64_t cols, F&& f) {
  int64_t column = 0;
  for (; column + kTileVecs * kWidth <= cols; column += kTileVecs * kWidth) {
    for_rows<kTileVecs>(rows, column, f);
  }
  for (; column < cols; column += kWidth) for_rows<1>(rows, column, f);
}

// out (rows, cols) = left @ right; right and out have `cols` columns, a multiple of kWidth.
void product(Left left, const float* right, float* out, int64_t rows, int64_t cols, int64_t depth) {
  for_tiles(rows, cols, [&]<int kRows, int kVecs>(int64_t row, int64_t column) {
    Vec total[kRows][kVecs] = {};
    const Left at{left.data + row * left.row_stride, left.row_stride, left.k_stride};
    multiply(total, at, right + column, cols, depth);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVecs; ++j)
        store(out + (row + i) * cols + column + j * kWidth, total[i][j]);
    }
  });
}

// out (cols, rows) = in (rows, cols) transposed; both sizes are multiples of kWidth.
void transposed(const float* in, float* out, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; row += kWidth) {
    for (int64_t column = 0; column < cols; column += kWidth) {
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) block[i] = load(in + (row + i) * cols + column);
      transpose(block);
      for (int i = 0; i < kWidth; ++i) store(out + (column + i) * rows + row, block[i]);
    }
  }
}

// a / (sqrt(x) * factor + epsilon) for x >= 0, within a few units in the last place: estimates and
// a Newton step each, because division and root of wide vectors take ten times as long.
UML_INLINE Vec over_root(Vec a, Vec x, float factor, float epsilon) {
#if defined(__AVX512F__)
  const Vec positive = vmax(x, splat(1e-38f));
  // Zero-masked forms: the plain ones set off a false warning of GCC 12.
  Vec r = (Vec)_mm512_maskz_rsqrt14_ps(0xFFFF, (__m512)positive);
  r = r * (1.5f - 0.5f * positive * r * r);
  const Vec denominator = positive * r * factor + epsilon;
  Vec inverse = (Vec)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)denominator);
  inverse = inverse * (2.0f - denominator * inverse);
  return a * inverse;
#else
  for (int i = 0; i < kWidth; ++i) x[i] = std::sqrt(x[i]);
  return a / (x * factor + epsilon);
#endif
}

// One step of AdamW (torch.optim.AdamW) with the bias corrections of the step in the factors.
struct Adam {
  float decay;       // 1 - rate * weight decay
  float rate;        // rate / (1 - beta1**t)
  float correction;  // 1 / sqrt(1 - beta2**t)

  Adam(float rate, float weight_decay, int64_t step)
      : decay(1 - rate * weight_decay),
        rate(static_cast<float>(rate / (1 - std::pow(0.9, step + 1)))),
        correction(static_cast<float>(1 / std::sqrt(1 - std::pow(0.999, step + 1)))) {}

  UML_INLINE void update(float* weight, float* first, float* second, Vec gradient) const {
    const Vec m = load(first) + (gradient - load(first)) * 0.1f;
    const Vec v = load(second) * 0.999f + gradient * gradient * 0.001f;
    store(first, m);
    store(second, v);
    store(weight, load(weight) * decay - rate * over_root(m, v, correction, 1e-8f));
  }
};

// Parameters of a cell and their moments lie in three arrays of one layout.
struct Parameters {
  float* weight;
  float* first;
  float* second;

  Parameters operator+(int64_t offset) const {
    return {weight + offset, first + offset, second + offset};
  }

  UML_INLINE void update(int64_t at, Vec gradient, const Adam& adam) const {
    adam.update(weight + at, first + at, second + at, gradient);
  }
};

// Rows of a batch of one modality, their labels and what becomes of them.
struct Branch {
  HeadSource source;
  const int32_t* order;  // rows of the batch; null: no such branch
  float weight;          // of its loss
  float* rows;           // (batch, width)
  float* logits;         // (batch, classes), then their gradient
};

void gather(const Branch& branch, int64_t batch) {
  const int64_t width = branch.source.width;
  for (int64_t i = 0; i < batch; ++i) {
    const float* from = branch.source.rows + branch.order[i] * width;
    for (int64_t c = 0; c < width; c += kWidth) store(branch.rows + i * width + c, load(from + c));
  }
}

// logits become the gradient of weight * mean cross-entropy of scale * logits; returns that of
// scale.
float cross_entropy_gradient(const Branch& branch, float scale, int64_t batch, int64_t classes,
                             int64_t stride) {
  float scale_gradient = 0;
  const float factor = branch.weight / static_cast<float>(batch);
  for (int64_t i = 0; i < batch; ++i) {
    float* row = branch.logits + i * stride;
    const int32_t label = branch.source.labels[branch.order[i]];
    const float at_label = row[label];
    const auto is_class = [&](int64_t c) { return iota() < static_cast<int32_t>(classes - c); };
    Vec top = splat(-INFINITY);
    for (int64_t c = 0; c < stride; c += kWidth) {
      top = vmax(top, is_class(c) ? load(row + c) * scale : splat(-INFINITY));
    }
    const Vec highest = splat(max(top));
    Vec total{}, weighted{};
    for (int64_t c = 0; c < stride; c += kWidth) {
      const Vec logit = load(row + c);
      const Vec power = is_class(c) ? exp(logit * scale - highest) : Vec{};
      total += power;
      weighted += power * logit;
      store(row + c, power);
    }
    const float share = factor / sum(total);
    for (int64_t c = 0; c < stride; c += kWidth) store(row + c, load(row + c) * (share * scale));
    row[label] -= factor * scale;
    scale_gradient += sum(weighted) * share - at_label * factor;
  }
  return scale_gradient;
}

// A part of a gradient: left (batch, rows) transposed @ gradient (batch, cols).
struct Term {
  const float* left;
  const float* gradient;
  int64_t batch;
};

// A step of the optimiser for a matrix whose gradient is the sum of two terms.
void update_matrix(const Parameters& p, int64_t rows, int64_t cols, Term a, Term b,
                   const Adam& adam) {
  for_tiles(rows, cols, [&]<int kRows, int kVecs>(int64_t row, int64_t column) {
    Vec total[kRows][kVecs] = {};
    multiply(total, {a.left + row, 1, rows}, a.gradient + column, cols, a.batch);
    multiply(total, {b.left + row, 1, rows}, b.gradient + column, cols, b.batch);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVecs; ++j) {
        p.update((row + i) * cols + column + j * kWidth, total[i][j], adam);
      }
    }
  });
}

void update_scale(const Parameters& p, float gradient, const Adam& adam) {
  alignas(64) float values[3][kWidth] = {{p.weight[0]}, {p.first[0]}, {p.second[0]}};
  adam.update(values[0], values[1], values[2], splat(gradient));
  p.weight[0] = values[0][0];
  p.first[0] = values[1][0];
  p.second[0] = values[2][0];
}

void train_cell(const HeadGrid& grid, const HeadCell& cell) {
  const int64_t batch = cell.batch, classes = round_up(grid.classes, 16);
  const int64_t image_width = grid.image.width, text_width = grid.text.width;
  const int64_t width = cell.has_projection ? text_width : image_width;  // of what the head sees
  float* scratch = thread_scratch(batch * (image_width + 3 * text_width + 2 * classes + width) +
                                  classes * width);
  const auto take = [&](int64_t floats) {
    float* at = scratch;
    scratch += floats;
    return at;
  };
  Branch image{grid.image, nullptr, 1, take(batch * image_width), take(batch * classes)};
  Branch text{grid.text, nullptr, cell.alpha, take(batch * text_width), take(batch * classes)};
  float* hidden = cell.has_projection ? take(batch * width) : image.rows;
  float* hidden_gradient = take(batch * width);
  float* head_transposed = take(classes * width);

  const Parameters scales{cell.weights, cell.first, cell.second};
  const Parameters head = scales + 16;
  const Parameters projection = head + width * classes;
  for (int64_t step = 0; step < cell.steps; ++step) {
    const Adam adam(cell.rates[step], cell.weight_decay, cell.begin + step);
    image.order = cell.image_order + step * batch;
    gather(image, batch);
    if (cell.has_projection) {
      product({image.rows, image_width, 1}, projection.weight, hidden, batch, width, image_width);
    }
    product({hidden, width, 1}, head.weight, image.logits, batch, classes, width);
    const float image_scale =
        cross_entropy_gradient(image, scales.weight[0], batch, grid.classes, classes);
    float text_scale = 0;
    Term text_term{text.rows, text.logits, 0};
    if (cell.text_order) {
      text.order = cell.text_order + step * batch;
      gather(text, batch);
      product({text.rows, width, 1}, head.weight, text.logits, batch, classes, width);
      text_scale = cross_entropy_gradient(text, scales.weight[1], batch, grid.classes, classes);
      text_term.batch = batch;
    }
    if (cell.has_projection) {
      transposed(head.weight, head_transposed, width, classes);
      product({image.logits, classes, 1}, head_transposed, hidden_gradient, batch, width, classes);
    }
    update_matrix(head, width, classes, {hidden, image.logits, batch}, text_term, adam);
    if (cell.has_projection) {
      update_matrix(projection, image_width, width, {image.rows, hidden_gradient, batch},
                    {image.rows, hidden_gradient, 0}, adam);
    }
    if (cell.learns_scale) {
      update_scale(scales, image_scale, adam);
      if (cell.text_order) update_scale(scales + 1, text_scale, adam);
    }
  }
}

}  // namespace

void train_heads(int threads, const HeadGrid& grid, const HeadCell* cells, int64_t count) {
  parallel_for(threads, count, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) train_cell(grid, cells[i]);
  });
}

}  // namespace uml::UML_ARCH
