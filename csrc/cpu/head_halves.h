// Products of fp32 values as sums of bf16 halves on matrix tiles (AMX): operands of linear heads.
//
// An fp32 value is a sum of two bf16 values, its high and its low half, within 2**-17 of it; a
// product of two such sums is three bf16 products with fp32 sums (the fourth, of both low halves,
// is within 2**-16 of the first). A 32-bit word holds halves of two values that are neighbours in
// the summed dimension; a tile is 16 rows of 16 words. An operation of tiles multiplies 16 rows by
// 32 summed values by 16 columns. Of up to 8 samples both halves are in one tile, and then all four
// products are made.
#pragma once

#if defined(__AMX_BF16__)

#include "simd.h"

namespace uml::UML_ARCH {

constexpr int64_t kSide = 16;                   // rows of a tile, and words of a row
constexpr int64_t kTileFloats = kSide * kSide;  // of memory
constexpr int64_t kBlock = 2 * kSide;           // rows of a matrix that a tile sums over
constexpr int64_t kFew = 8;                     // samples whose halves share a tile
constexpr int64_t kGroupTiles = 2;              // of samples, multiplied together

// Tiles 0..3 hold sums over blocks, 4..7 whatever is at hand. The clobbers keep accesses to memory
// on their side.
template <int kTile>
UML_INLINE void load_tile(const float* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t{64}), "i"(kTile)
               : "memory");
}
template <int kTile>
UML_INLINE void store_tile(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * 4), "i"(kTile) : "memory");
}
template <int kTile>
UML_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kSum, int kLeft, int kRight>
UML_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

// The low, or the high, 16 bits of each lane of a and b as one word.
UML_INLINE Vec low_words(Vec a, Vec b) {
  return (Vec)_mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)a, (__m512i)((VecU)b << 16));
}
UML_INLINE Vec high_words(Vec a, Vec b) {
  return (Vec)_mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)((VecU)a >> 16), (__m512i)b);
}

// Halves of two vectors, lane by lane; rounded to nearest, ties away from zero.
struct Words {
  Vec high, low;
};
UML_INLINE Words split(Vec a, Vec b) {
  const Vec high_a = (Vec)(((VecU)a + 0x8000) & 0xFFFF0000);
  const Vec high_b = (Vec)(((VecU)b + 0x8000) & 0xFFFF0000);
  const Vec low_a = (Vec)((VecU)(a - high_a) + 0x8000);
  const Vec low_b = (Vec)((VecU)(b - high_b) + 0x8000);
  return {high_words(high_a, high_b), high_words(low_a, low_b)};
}

UML_INLINE int64_t tiles_of(int64_t values) { return (values + kSide - 1) / kSide; }
UML_INLINE int64_t blocks_of(int64_t values) { return (values + kBlock - 1) / kBlock; }

// Samples as left operands: rows are those that are multiplied next, columns, made of them once
// that is done, make the gradient of it. `rows`: [block of 32 features][tile of 16 samples][half],
// a word holds features f and f + 16 of the block. `columns`: [tile of 16 features][32
// samples][half], a row is a feature, a word holds samples s and s + 16. Of few samples the halves
// share a tile: samples and words of the high halves, then of the low ones; in `columns` both
// again.
struct Samples {
  static constexpr int64_t kAhead = 4;  // rows that are asked for before they are read

  int64_t count, width;
  float *rows, *columns;

  bool is_few() const { return count <= kFew; }
  int64_t halves() const { return is_few() ? 1 : 2; }
  int64_t tiles() const { return tiles_of(count); }
  int64_t chunks() const { return blocks_of(count); }
  int64_t row_floats() const { return blocks_of(width) * tiles() * halves() * kTileFloats; }
  int64_t column_floats() const { return 2 * blocks_of(width) * chunks() * halves() * kTileFloats; }
  float* row_tile(int64_t block, int64_t tile) const {
    return rows + (block * tiles() + tile) * halves() * kTileFloats;
  }
  float* column_tile(int64_t tile) const {
    return columns + tile * chunks() * halves() * kTileFloats;
  }

  void pack_rows(const float* const* from) const {
    for (int64_t s = 0; s < count; ++s) {
      float* high = row_tile(0, s / kSide) + s % kSide * kSide;
      float* low = high + (is_few() ? kFew * kSide : kTileFloats);
      const int64_t step = tiles() * halves() * kTileFloats;
      const float* ahead = from[smaller(s + kAhead, count - 1)];
      for (int64_t f = 0; f < width; f += kBlock, high += step, low += step) {
        __builtin_prefetch(ahead + f);
        __builtin_prefetch(ahead + f + kSide);
        const Vec second = f + kSide < width ? load(from[s] + f + kSide) : Vec{};
        const Words words = split(load(from[s] + f), second);
        store(high, words.high);
        store(low, words.low);
      }
    }
  }

  // Makes right operands of the rows: words by samples.
  void transpose_rows() const {
    for (float* tile = rows; tile < rows + row_floats(); tile += kTileFloats) {
      Vec lines[kSide];
      for (int64_t i = 0; i < kSide; ++i) lines[i] = load(tile + i * kSide);
      transpose(lines);
      for (int64_t i = 0; i < kSide; ++i) store(tile + i * kSide, lines[i]);
    }
  }

  void pack_columns() const {
    for (int64_t tile = 0; tile < 2 * blocks_of(width); ++tile) {
      for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
        const float* from = row_tile(tile / 2, 2 * chunk);
        float* to = column_tile(tile) + chunk * halves() * kTileFloats;
        const bool has_second = is_few() || 2 * chunk + 1 < tiles();
        for (int64_t half = 0; half < halves(); ++half, from += kTileFloats, to += kTileFloats) {
          Vec lines[kSide];
          for (int64_t j = 0; j < kSide; ++j) {
            const float* at = from + (is_few() ? j % 4 + j / 4 % 2 * kFew : j) * kSide;
            const float* other = at + (is_few() ? 4 * kSide : 2 * kTileFloats);
            const Vec second = has_second ? load(other) : Vec{};
            lines[j] = tile % 2 ? high_words(load(at), second) : low_words(load(at), second);
          }
          transpose(lines);
          for (int64_t i = 0; i < kSide; ++i) store(to + i * kSide, lines[i]);
        }
      }
    }
  }
};

// Gradients of the products of samples as right operands: [tile of 16 columns][32 samples][half], a
// row is samples s and s + 16 of the 32. Of few samples: the words of the high halves twice, then
// those of the low ones.
struct Gradients {
  int64_t count, cols;
  float* tiles;

  bool is_few() const { return count <= kFew; }
  int64_t stride() const { return blocks_of(count) * (is_few() ? 1 : 2) * kTileFloats; }
  int64_t floats() const { return tiles_of(cols) * stride(); }

  void pack(const float* from, int64_t from_stride) const {
    const int64_t pairs = is_few() ? 4 : kSide;
    float* to = tiles;
    for (int64_t c = 0; c < cols; c += kSide) {
      for (int64_t begin = 0; begin < count; begin += kBlock) {
        const auto value = [&](int64_t s) {
          return s < count ? load(from + s * from_stride + c) : Vec{};
        };
        for (int64_t j = 0; j < pairs; ++j) {
          const Words words = split(value(begin + j), value(begin + j + pairs));
          store(to + j * kSide, words.high);
          if (is_few()) {
            store(to + (j + 4) * kSide, words.high);
            store(to + (j + 8) * kSide, words.low);
            store(to + (j + 12) * kSide, words.low);
          } else {
            store(to + kTileFloats + j * kSide, words.low);
          }
        }
        to += is_few() ? kTileFloats : 2 * kTileFloats;
      }
    }
  }
};

}  // namespace uml::UML_ARCH

#endif
