// A matrix in training: weights and moments of AdamW as tiles, and the one pass over them that a
// step makes.
//
// A step of a small head reads and writes some 2 MB of weights and moments, about what a core's
// second-level cache holds, and does few operations with each value. So they lie in the order in
// which they are visited: strips of kTileVecs vectors, in a strip one tile of kPanel rows after the
// other, in a tile its weights, then its first, then its second moments. A visit makes the tile's
// gradient in registers, uses it up there, and multiplies the new weights with the rows of the next
// step while they are in the first-level cache.
//
// Rows that are multiplied with a matrix lie in panels: kPanel features of every row of the batch,
// then the next kPanel. Both products read them in order then. Batches are padded with rows of
// zeros to a multiple of kPanel.
#pragma once

#include <cmath>

#include "simd.h"

namespace uml::UML_ARCH {

#if defined(__AVX512F__)
constexpr int kPanel = 8;
constexpr int kTileVecs = 3;
#else
constexpr int kPanel = 4;
constexpr int kTileVecs = 2;
#endif
constexpr int kPanelsInBlock = 4;  // multiplied with the next rows together: 6 KiB of weights

// Columns of a matrix that are visited together.
struct Strip {
  int64_t column;
  int vecs;
};

// The strips of `cols` columns: whole ones, then a rest of 1, 2 or 2 + 2 vectors, because products
// with one vector a row are short of loads.
struct Strips {
  int64_t whole, rest;

  UML_INLINE explicit Strips(int64_t cols) {
    const int64_t vecs = cols / kWidth;
    whole = vecs / kTileVecs;
    if (kTileVecs == 3 && vecs % 3 == 1 && vecs > 1) --whole;
    rest = vecs - whole * kTileVecs;
  }
  UML_INLINE int64_t count() const { return whole + (rest + 1) / 2; }
  UML_INLINE Strip operator[](int64_t i) const {
    if (i < whole) return {i * kTileVecs * kWidth, kTileVecs};
    const int64_t done = 2 * (i - whole);
    return {(whole * kTileVecs + done) * kWidth, rest - done > 1 ? 2 : 1};
  }
};

// Calls f<vectors>() for a strip.
template <class F>
UML_INLINE void with_vecs(int vecs, F&& f) {
  if constexpr (kTileVecs > 2) {
    if (vecs == 3) return f.template operator()<3>();
  }
  if (vecs == 2) return f.template operator()<2>();
  f.template operator()<1>();
}

// A matrix read as (row, k) with any two strides.
struct Left {
  const float* data;
  int64_t row_stride;
  int64_t k_stride;
};

template <int kVecs>
UML_INLINE void clear(Vec (&total)[kPanel][kVecs]) {
  for (int i = 0; i < kPanel; ++i) {
    for (int j = 0; j < kVecs; ++j) total[i][j] = Vec{};
  }
}

// total += sum over k of left[row, k] * right[k, column ...].
template <int kVecs>
UML_INLINE void multiply(Vec (&total)[kPanel][kVecs], Left left, const float* right,
                         int64_t right_stride, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[kVecs];
    for (int j = 0; j < kVecs; ++j) b[j] = load(right + j * kWidth);
    for (int i = 0; i < kPanel; ++i) {
      const Vec a = splat(left.data[i * left.row_stride]);
      for (int j = 0; j < kVecs; ++j) total[i][j] += a * b[j];
    }
    left.data += left.k_stride;
    right += right_stride;
  }
}

// out (rows, cols) = left @ right; rows is a multiple of kPanel, cols of kWidth. A stride of 0:
// that matrix lies strip after strip, each row-major.
UML_INLINE void product(Left left, const float* right, int64_t right_stride, float* out,
                        int64_t out_stride, int64_t rows, int64_t cols, int64_t depth) {
  const Strips strips(cols);
  for (int64_t s = 0; s < strips.count(); ++s) {
    const Strip strip = strips[s];
    with_vecs(strip.vecs, [&]<int kVecs>() {
      const bool is_packed = right_stride == 0;
      const float* from = right + strip.column * (is_packed ? depth : 1);
      for (int64_t row = 0; row < rows; row += kPanel) {
        Vec total[kPanel][kVecs];
        clear(total);
        multiply(total, {left.data + row * left.row_stride, left.row_stride, left.k_stride}, from,
                 is_packed ? kVecs * kWidth : right_stride, depth);
        for (int i = 0; i < kPanel; ++i) {
          float* to = out_stride ? out + (row + i) * out_stride + strip.column
                                 : out + rows * strip.column + (row + i) * kVecs * kWidth;
          for (int j = 0; j < kVecs; ++j) {
            store(to + j * kWidth, total[i][j]);
          }
        }
      }
    });
  }
}

// One step of AdamW (torch.optim.AdamW). Moments are kept divided by 1 - beta, which leaves one
// and two operations for them; bias corrections and those factors are in the constants.
struct Adam {
  static constexpr float kBeta1 = 0.9f, kBeta2 = 0.999f;
  static constexpr float kFirst = 0.1f, kSecond = 0.001f;  // 1 - beta
  // Keeps roots and rates away from zero; far below the squared epsilon.
  static constexpr float kTiny = 1e-30f;

  // The learning rate is in the denominators, which saves an operation.
  Vec decay;    // 1 - rate * weight decay
  Vec root;     // sqrt((1 - beta2) / (1 - beta2**t)) / factor
  Vec epsilon;  // 1e-8 / factor; factor = rate * (1 - beta1) / (1 - beta1**t)

  Adam(double rate, double weight_decay, int64_t step) {
    const double factor = (rate > kTiny ? rate : kTiny) * 0.1 / (1 - std::pow(0.9, step + 1));
    decay = splat(static_cast<float>(1 - rate * weight_decay));
    root = splat(static_cast<float>(std::sqrt(0.001 / (1 - std::pow(0.999, step + 1))) / factor));
    epsilon = splat(static_cast<float>(1e-8 / factor));
  }

  // Returns the new weight, too.
  UML_INLINE Vec update(float* weight, float* first, float* second, Vec gradient) const {
    const Vec m = load(first) * kBeta1 + gradient;
    const Vec v = load(second) * kBeta2 + (gradient * gradient + kTiny);
    const Vec w = load(weight) * decay - over_root(m, v);
    store(first, m);
    store(second, v);
    store(weight, w);
    return w;
  }

  // m / (sqrt(v) * root + epsilon) within a few units in the last place: estimates and a Newton
  // step each, because division and root of wide vectors take ten times as long.
  UML_INLINE Vec over_root(Vec m, Vec v) const {
#if defined(__AVX512F__)
    // Zero-masked forms: the plain ones set off a false warning of GCC 12.
    const Vec r = (Vec)_mm512_maskz_rsqrt14_ps(0xFFFF, (__m512)v);
    const Vec s = v * r;
    const Vec rough = s * root + epsilon;
    const Vec q = (Vec)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)rough);
    const Vec denominator = (v - s * s) * (r * (0.5f * root)) + rough;
    const Vec y = m * q;
    return y + q * (m - denominator * y);
#else
    for (int i = 0; i < kWidth; ++i) v[i] = std::sqrt(v[i]);
    return m / (v * root + epsilon);
#endif
  }
};

// One matrix of a cell, packed as the top of this file says.
struct Matrix {
  int64_t rows, cols;
  float* tiles;  // 3 * rows * cols floats

  // Calls f(offset in a row-major matrix, weights, first moments, second moments) for every vector.
  template <class F>
  UML_INLINE void for_vectors(F&& f) const {
    const Strips strips(cols);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t s = 0; s < strips.count(); ++s) {
        const Strip strip = strips[s];
        const int64_t columns = strip.vecs * kWidth, tile = kPanel * columns;
        float* at = tiles + 3 * rows * strip.column + 3 * (row / kPanel) * tile;
        at += row % kPanel * columns;
        for (int64_t c = 0; c < columns; c += kWidth) {
          f(row * cols + strip.column + c, at + c, at + c + tile, at + c + 2 * tile);
        }
      }
    }
  }

  // From and to row-major weights and moments.
  void pack(const float* weight, const float* first, const float* second) const {
    for_vectors([&](int64_t at, float* w, float* m, float* v) {
      store(w, load(weight + at));
      store(m, load(first + at) * (1 / Adam::kFirst));
      store(v, load(second + at) * (1 / Adam::kSecond));
    });
  }
  void unpack(float* weight, float* first, float* second) const {
    for_vectors([&](int64_t at, const float* w, const float* m, const float* v) {
      store(weight + at, load(w));
      store(first + at, load(m) * Adam::kFirst);
      store(second + at, load(v) * Adam::kSecond);
    });
  }

  // The first `depth` columns as rows, strips one after the other.
  void transposed(float* out, int64_t depth) const {
    const Strips strips(cols), out_strips(rows);
    for (int64_t s = 0; s < strips.count(); ++s) {
      with_vecs(strips[s].vecs, [&]<int kVecs>() {
        constexpr int64_t kTile = int64_t{kPanel} * kVecs * kWidth;
        const int64_t column = strips[s].column;
        const float* from = tiles + 3 * rows * column;
        for (int64_t t = 0; t < out_strips.count(); ++t) {
          const int64_t stride = out_strips[t].vecs * kWidth;
          float* to = out + depth * out_strips[t].column + column * stride;
          for (int64_t r = 0; r < stride; r += kWidth, from += 3 * kWidth / kPanel * kTile) {
            for (int j = 0; j < kVecs; ++j) {
              Vec block[kWidth];
              for (int i = 0; i < kWidth; ++i) {
                const int64_t row = i / kPanel * 3 * kTile + i % kPanel * kVecs * kWidth;
                block[i] = load(from + row + j * kWidth);
              }
              transpose(block);
              const int64_t lines = smaller(kWidth, depth - column - j * kWidth);
              for (int64_t i = 0; i < lines; ++i) {
                store(to + (j * kWidth + i) * stride + r, block[i]);
              }
            }
          }
        }
      });
    }
  }
};

// What one modality does with a matrix in a step.
struct Use {
  int64_t batch, padded;             // rows, and rows in panels
  const float* rows = nullptr;       // panels that were multiplied
  const float* gradient = nullptr;   // of the products: (batch, gradient_stride), or
  int64_t gradient_stride;           // 0: strip after strip of (padded, columns)
  const float* next_rows = nullptr;  // panels that are multiplied with the new weights
  float* out = nullptr;  // those products: panels, or (padded, out_stride) where that is not 0
  int64_t out_stride;
  float* sums;  // (padded, kTileVecs * kWidth)
  // Features of the step after the next, asked for between tiles: they lie anywhere in memory, and
  // waiting for them takes a tenth of a step.
  HeadSource source;
  const int32_t* later = nullptr;  // null: none

  UML_INLINE void ask(int64_t tile, int64_t tiles) const {
    const int64_t lines = source.width / 16, total = batch * lines;
    const int64_t share = (total + tiles - 1) / tiles;
    for (int64_t i = tile * share; i < smaller(total, (tile + 1) * share); ++i) {
      const int64_t row = later[i / lines];
      __builtin_prefetch(source.rows + row * source.width + i % lines * 16, 0, 2);
    }
  }
};

// Part of a pass over one strip.
template <int kVecs>
struct StripPass {
  static constexpr int64_t kColumns = kVecs * kWidth;
  static constexpr int64_t kTile = kPanel * kColumns;

  int64_t column;
  float* tiles;
  int64_t panels;
  int64_t strip, strips;

  UML_INLINE void update(const Use* uses, int64_t count, int64_t panel, Adam adam) const {
    float* tile = tiles + 3 * panel * kTile;
    Vec total[kPanel][kVecs];
    clear(total);
    for (int64_t u = 0; u < count; ++u) {
      const Use& use = uses[u];
      if (use.later) use.ask(strip * panels + panel, strips * panels);
      const bool is_packed = use.gradient_stride == 0;
      multiply(total, {use.rows + panel * use.padded * kPanel, 1, kPanel},
               use.gradient + column * (is_packed ? use.padded : 1),
               is_packed ? kColumns : use.gradient_stride, use.batch);
    }
    for (int i = 0; i < kPanel; ++i) {
      for (int j = 0; j < kVecs; ++j) {
        float* weight = tile + (i * kVecs + j) * kWidth;
        for (int k = 0; k < 3; ++k) __builtin_prefetch(weight + (3 + k) * kTile, 1);
        adam.update(weight, weight + kTile, weight + 2 * kTile, total[i][j]);
      }
    }
  }

  // Adds the products of a block of panels for kPanel rows of the next batch.
  UML_INLINE void multiply_next(const Use& use, int64_t row, int64_t first, int64_t last) const {
    float* sums = use.sums + row * kColumns;
    Vec total[kPanel][kVecs];
    clear(total);
    if (first > 0) {
#pragma GCC unroll 8
      for (int i = 0; i < kPanel; ++i) {
        for (int j = 0; j < kVecs; ++j) total[i][j] = load(sums + i * kColumns + j * kWidth);
      }
    }
    for (int64_t p = first; p < last; ++p) {
      multiply(total, {use.next_rows + (p * use.padded + row) * kPanel, kPanel, 1},
               tiles + 3 * p * kTile, kColumns, kPanel);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPanel; ++i) {
      for (int j = 0; j < kVecs; ++j) store(sums + i * kColumns + j * kWidth, total[i][j]);
    }
    if (last < panels) return;
    for (int i = 0; i < kPanel; ++i) {
      for (int j = 0; j < kVecs; ++j) {
        emit(use, row + i, column + j * kWidth, load(sums + i * kColumns + j * kWidth));
      }
    }
  }

  static UML_INLINE void emit(const Use& use, int64_t row, int64_t at, Vec value) {
    if (use.out_stride) return store(use.out + row * use.out_stride + at, value);
    float lanes[kWidth];
    store(lanes, value);
    for (int i = 0; i < kWidth; i += kPanel) {
      std::memcpy(use.out + ((at + i) / kPanel * use.padded + row) * kPanel, lanes + i,
                  kPanel * sizeof(float));
    }
  }
};

// One pass over a matrix: a step of the optimiser with the gradients of all uses, unless `adam` is
// null, and the products of the next rows with the new weights, if there are any. Every other pass
// goes backwards over the strips, so that it begins with those that are still in the cache.
UML_INLINE void pass(const Matrix& matrix, const Use* uses, int64_t count, const Adam* adam,
                     bool has_next, bool is_backward) {
  const Strips strips(matrix.cols);
  const int64_t panels = matrix.rows / kPanel;
  for (int64_t s = 0; s < strips.count(); ++s) {
    const Strip strip = strips[is_backward ? strips.count() - 1 - s : s];
    with_vecs(strip.vecs, [&]<int kVecs>() {
      const StripPass<kVecs> part{strip.column, matrix.tiles + 3 * matrix.rows * strip.column,
                                  panels, s, strips.count()};
      for (int64_t first = 0; first < panels; first += kPanelsInBlock) {
        const int64_t last = smaller(first + kPanelsInBlock, panels);
        for (int64_t p = first; adam && p < last; ++p) part.update(uses, count, p, *adam);
        for (int64_t u = 0; has_next && u < count; ++u) {
          for (int64_t row = 0; row < uses[u].padded; row += kPanel) {
            part.multiply_next(uses[u], row, first, last);
          }
        }
      }
    });
  }
}

}  // namespace uml::UML_ARCH
