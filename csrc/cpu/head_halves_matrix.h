// A matrix in training whose products are made of bf16 halves (head_halves.h), and the one pass
// over it that a step makes.
//
// Weights and moments stay fp32: strips of 32 columns, in a strip one block of 32 rows after the
// other. A visit of a block updates it with its gradient, which the tiles made during the visit
// before, and splits the new weights; the tiles multiply those with the rows of the next step
// during the visit after. So matrix tiles and vectors work at the same time.
#pragma once

#if defined(__AMX_BF16__)

#include "head_halves.h"
#include "head_matrix.h"

namespace uml::UML_ARCH {

// Weights and moments: a block is rows f, f + 16 for f = 0..15; of each row kCols vectors, of each
// vector its weights, then its first, then its second moments. Halves of the weights as right
// operands: [strip][block][tile of columns][half]; a word holds rows f and f + 16.
struct HalvesMatrix {
  int64_t rows, cols;
  float* state;
  float* halves;
  bool keeps_halves;  // of all strips rather than of the one that is visited

  int64_t blocks() const { return blocks_of(rows); }
  int64_t strips() const { return blocks_of(cols); }
  int64_t strip_cols(int64_t strip) const { return smaller(2, tiles_of(cols) - 2 * strip); }
  int64_t state_floats() const { return 3 * blocks() * kBlock * cols; }
  int64_t halves_floats() const { return (keeps_halves ? strips() : 1) * strip_halves(); }
  int64_t strip_halves() const { return blocks() * 4 * kTileFloats; }
  float* strip_state(int64_t strip) const { return state + 3 * blocks() * kBlock * kBlock * strip; }
  float* halves_of(int64_t strip) const {
    return halves + (keeps_halves ? strip : 0) * strip_halves();
  }

  // Calls f(offset in a row-major matrix, or -1 beyond its rows, vectors) for every three vectors.
  template <class F>
  UML_INLINE void for_vectors(F&& f) const {
    for (int64_t strip = 0; strip < strips(); ++strip) {
      float* at = strip_state(strip);
      for (int64_t pair = 0; pair < blocks() * kSide; ++pair) {
        for (int64_t row = pair / kSide * kBlock + pair % kSide, i = 0; i < 2; ++i, row += kSide) {
          for (int64_t c = 0; c < strip_cols(strip); ++c, at += 3 * kWidth) {
            f(row < rows ? row * cols + strip * kBlock + c * kSide : -1, at);
          }
        }
      }
    }
  }

  // From and to row-major weights and moments.
  void pack(const float* weight, const float* first, const float* second) const {
    for_vectors([&](int64_t from, float* to) {
      store(to, from < 0 ? Vec{} : load(weight + from));
      store(to + kWidth, from < 0 ? Vec{} : load(first + from) * (1 / Adam::kFirst));
      store(to + 2 * kWidth, from < 0 ? Vec{} : load(second + from) * (1 / Adam::kSecond));
    });
  }
  void unpack(float* weight, float* first, float* second) const {
    for_vectors([&](int64_t to, const float* from) {
      if (to < 0) return;
      store(weight + to, load(from));
      store(first + to, load(from + kWidth) * Adam::kFirst);
      store(second + to, load(from + 2 * kWidth) * Adam::kSecond);
    });
  }
};

// A visit of one strip of kCols tiles.
template <int kCols>
struct StripVisit {
  const Samples& samples;
  const float* gradients;   // of this strip
  int64_t gradient_stride;  // between its tiles of columns
  bool has_next;
  float* state;
  float* halves;
  float* made;  // (2, 2, kCols, kTileFloats) gradients of two blocks
  int64_t blocks;

  UML_INLINE float* block_halves(int64_t block, int col) const {
    return halves + (block * kCols + col) * 2 * kTileFloats;
  }
  UML_INLINE float* block_made(int64_t block, int64_t half) const {
    return made + (block % 2 * 2 + half) * kCols * kTileFloats;
  }

  // The gradient of 16 rows of a block.
  UML_INLINE void make_gradient(int64_t block, int64_t half) const {
    const bool is_few = samples.is_few();
    const float* left = samples.column_tile(2 * block + half);
    const float* right = gradients;
    const float* other = gradients + gradient_stride;
    clear_tile<4>();
    if constexpr (kCols == 2) clear_tile<5>();
    for (int64_t n = samples.chunks(); n > 0; --n) {
      load_tile<6>(left);
      load_tile<7>(right);
      multiply_tiles<4, 6, 7>();
      if constexpr (kCols == 2) {
        load_tile<7>(other);
        multiply_tiles<5, 6, 7>();
      }
      if (is_few) break;
      load_tile<7>(right + kTileFloats);
      multiply_tiles<4, 6, 7>();
      if constexpr (kCols == 2) {
        load_tile<7>(other + kTileFloats);
        multiply_tiles<5, 6, 7>();
      }
      load_tile<6>(left + kTileFloats);
      load_tile<7>(right);
      multiply_tiles<4, 6, 7>();
      if constexpr (kCols == 2) {
        load_tile<7>(other);
        multiply_tiles<5, 6, 7>();
      }
      left += 2 * kTileFloats;
      right += 2 * kTileFloats;
      other += 2 * kTileFloats;
    }
    store_tile<4>(block_made(block, half), kSide);
    if constexpr (kCols == 2) store_tile<5>(block_made(block, half) + kTileFloats, kSide);
  }

  template <int kCol>
  UML_INLINE void multiply_one(const float* left, bool is_few, bool has_second) const {
    load_tile<4>(left);
    multiply_tiles<kCol, 4, 6>();
    multiply_tiles<kCol, 4, 7>();
    if (is_few) return;
    load_tile<5>(left + kTileFloats);
    multiply_tiles<kCol, 5, 6>();
    if (!has_second) return;
    load_tile<4>(left + 2 * kTileFloats);
    multiply_tiles<2 + kCol, 4, 6>();
    multiply_tiles<2 + kCol, 4, 7>();
    load_tile<5>(left + 3 * kTileFloats);
    multiply_tiles<2 + kCol, 5, 6>();
  }

  // Adds the products of a block for a group of samples to the tiles 0..3.
  template <int kCol>
  UML_INLINE void multiply_next(int64_t block, int64_t group) const {
    if constexpr (kCol < kCols) {
      const int64_t tile = group * kGroupTiles;
      load_tile<6>(block_halves(block, kCol));
      load_tile<7>(block_halves(block, kCol) + kTileFloats);
      multiply_one<kCol>(samples.row_tile(block, tile), samples.is_few(),
                         tile + 1 < samples.tiles());
    }
  }

  UML_INLINE void clear_sums() const {
    clear_tile<0>();
    clear_tile<1>();
    clear_tile<2>();
    clear_tile<3>();
  }

  UML_INLINE void store_sums(float* out, int64_t stride, int64_t group) const {
    out += group * kGroupTiles * kSide * stride;
    store_tile<0>(out, stride);
    if constexpr (kCols == 2) store_tile<1>(out + kSide, stride);
    if (samples.is_few()) {
      for (int64_t s = 0; s < samples.count; ++s) {
        for (int c = 0; c < kCols; ++c) {
          float* to = out + s * stride + c * kSide;
          store(to, load(to) + load(to + kFew * stride));
        }
      }
    }
    if (group * kGroupTiles + 1 < samples.tiles()) {
      store_tile<2>(out + kSide * stride, stride);
      if constexpr (kCols == 2) store_tile<3>(out + kSide * stride + kSide, stride);
    }
  }

  // Updates a block, if there are gradients, and splits its weights.
  template <bool kUpdates>
  UML_INLINE void update(int64_t block, Adam adam) const {
    constexpr int64_t kVectors = 3 * kWidth;
    float* at = state + block * kBlock * kCols * kVectors;
#pragma GCC unroll 1
    for (int64_t f = 0; f < kSide; ++f) {
      for (int c = 0; c < kCols; ++c, at += kVectors) {
        float* other = at + kCols * kVectors;
        Vec weight, other_weight;
        if constexpr (kUpdates) {
          for (int k = 0; k < 3; ++k) {
            __builtin_prefetch(at + kAhead + k * kWidth, 1);
            __builtin_prefetch(other + kAhead + k * kWidth, 1);
          }
          const float* gradient = block_made(block, 0) + c * kTileFloats + f * kSide;
          weight = adam.update(at, at + kWidth, at + 2 * kWidth, load(gradient));
          other_weight = adam.update(other, other + kWidth, other + 2 * kWidth,
                                     load(gradient + kCols * kTileFloats));
        } else {
          weight = load(at);
          other_weight = load(other);
        }
        const Words words = split(weight, other_weight);
        float* to = block_halves(block, c) + f * kSide;
        store(to, words.high);
        store(to + kTileFloats, words.low);
      }
      at += kCols * kVectors;
    }
  }
  static constexpr int64_t kAhead = 6 * 2 * kCols * 3 * kWidth;  // floats: 6 pairs of rows

  // The operations of tiles come in one piece: each change between them and vectors costs some 30
  // cycles.
  template <bool kUpdates>
  UML_INLINE void visit(int64_t block, Adam adam) const {
    if (kUpdates && block + 1 < blocks) {
      make_gradient(block + 1, 0);
      make_gradient(block + 1, 1);
    }
    if (has_next && block > 0) {
      multiply_next<0>(block - 1, 0);
      multiply_next<1>(block - 1, 0);
    }
    update<kUpdates>(block, adam);
  }
};

// One pass over a matrix: a step of the optimiser with the columns of `samples` and gradients, if
// it updates, then, if there is a next step, the products of their rows with the new weights as
// rows of `out`, which has whole tiles of them. Every other pass goes backwards over the strips, so
// that it begins with those that are still in the cache.
inline void pass(const HalvesMatrix& matrix, const Samples& samples, const Gradients& gradients,
                 float* out, int64_t out_stride, const Adam& adam, bool updates, bool has_next,
                 bool is_backward) {
  alignas(64) float made[8 * kTileFloats];
  const int64_t strips = matrix.strips(), blocks = matrix.blocks();
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t strip = is_backward ? strips - 1 - i : i;
    const auto visit = [&]<int kCols>() {
      const StripVisit<kCols> part{samples,
                                   gradients.tiles + 2 * strip * gradients.stride(),
                                   gradients.stride(),
                                   has_next,
                                   matrix.strip_state(strip),
                                   matrix.halves_of(strip),
                                   made,
                                   blocks};
      part.clear_sums();
      if (updates) {
        part.make_gradient(0, 0);
        part.make_gradient(0, 1);
      }
      for (int64_t block = 0; block < blocks; ++block) {
        if (updates) {
          part.template visit<true>(block, adam);
        } else {
          part.template visit<false>(block, adam);
        }
      }
      if (!has_next) return;
      part.template multiply_next<0>(blocks - 1, 0);
      part.template multiply_next<1>(blocks - 1, 0);
      part.store_sums(out + strip * kBlock, out_stride, 0);
      for (int64_t group = 1; group * kGroupTiles < samples.tiles(); ++group) {
        part.clear_sums();
        for (int64_t block = 0; block < blocks; ++block) {
          part.template multiply_next<0>(block, group);
          part.template multiply_next<1>(block, group);
        }
        part.store_sums(out + strip * kBlock, out_stride, group);
      }
    };
    matrix.strip_cols(strip) == 2 ? visit.template operator()<2>() : visit.template operator()<1>();
  }
}

}  // namespace uml::UML_ARCH

#endif
