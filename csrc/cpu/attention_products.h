// Small matrix products C (+)= A B of packed operands, for attention.
//
// Operands are arrays of 32-bit words: a word holds one fp32 value (Singles) or two bf16 values
// that are neighbours in the summed dimension (Pairs). Sums are fp32.
//   A  read word by word with any strides (Operand); for Pairs always panels of kWidth words.
//   B  panels of kWidth columns: [panel][word of the summed dimension][kWidth].
//   C  panels of kWidth columns: [panel][row][kWidth] of fp32.
#pragma once

#include <type_traits>

#include "simd.h"

namespace uml::UML_ARCH {

// Word k of row i is data[i * row + k / kWidth * panel + k % kWidth * col].
struct Operand {
  const float* data;
  int64_t row;
  int64_t col;
  int64_t panel;
};

// Arithmetic on words of one fp32 value.
struct Singles {
  static constexpr int kPerWord = 1;
  UML_INLINE static Vec broadcast(const float* word) { return splat(*word); }
  UML_INLINE static Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Arithmetic on words of two bf16 values, the first in the low half.
struct Pairs {
  static constexpr int kPerWord = 2;
  UML_INLINE static Vec broadcast(const float* word) {
    int32_t bits;
    std::memcpy(&bits, word, sizeof bits);
    return (Vec)_mm512_set1_epi32(bits);
  }
  UML_INLINE static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Words for elements of type T.
#if defined(__AVX512BF16__)
template <class T>
using OpOf = std::conditional_t<std::is_same_v<T, bf16>, Pairs, Singles>;
#else
template <class T>
using OpOf = Singles;
#endif

// Rows of a register tile of `cols` vectors: accumulators, columns and one broadcast fill the
// registers, 32 of AVX-512, else 16.
constexpr int tile_rows(int cols) {
#if defined(__AVX512F__)
  return cols == 4 ? 6 : cols == 3 ? 8 : 12;
#elif defined(__AVX2__)
  return cols == 2 ? 6 : 8;
#else
  return cols == 2 ? 4 : 6;
#endif
}

template <class Op, int kRows, int kCols, bool kAdd>
UML_INLINE void tile(Operand a, const float* b, int64_t b_panel, float* c, int64_t c_panel,
                     int64_t k) {
  Vec sum[kRows][kCols];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kCols; ++j) {
      sum[i][j] = kAdd ? load(c + j * c_panel + i * kWidth) : Vec{};
    }
  }
  for (int64_t k0 = 0; k0 < k; k0 += kWidth, a.data += a.panel) {
    const float* ak = a.data;
    for (int64_t n = smaller(kWidth, k - k0); n > 0; --n, ak += a.col, b += kWidth) {
      Vec bk[kCols];
      for (int j = 0; j < kCols; ++j) bk[j] = load(b + j * b_panel);
      for (int i = 0; i < kRows; ++i) {
        const Vec aik = Op::broadcast(ak + i * a.row);
        for (int j = 0; j < kCols; ++j) sum[i][j] = Op::multiply_add(aik, bk[j], sum[i][j]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kCols; ++j) store(c + j * c_panel + i * kWidth, sum[i][j]);
  }
}

// All m rows of kCols panels: tiles of kRows rows, then one of what is left.
template <class Op, int kRows, int kCols, bool kAdd>
void column(int64_t m, Operand a, const float* b, int64_t b_panel, float* c, int64_t c_panel,
            int64_t k) {
  for (; m >= kRows; m -= kRows, a.data += kRows * a.row, c += kRows * kWidth) {
    tile<Op, kRows, kCols, kAdd>(a, b, b_panel, c, c_panel, k);
  }
  if constexpr (kRows > 1) {
    if (m > 0) column<Op, kRows - 1, kCols, kAdd>(m, a, b, b_panel, c, c_panel, k);
  }
}

// C[m rows, panels] (+)= A[m, k words] B.
template <class Op, bool kAdd>
void vector_product(int64_t m, int64_t panels, int64_t k, Operand a, const float* b,
                    int64_t b_panel, float* c, int64_t c_panel) {
  for (int64_t j = 0; j < panels;) {
    const int64_t left = panels - j;
    const int64_t groups = (left + kRegisterColumns - 1) / kRegisterColumns;
    const int64_t width = (left + groups - 1) / groups;
    const float* bj = b + j * b_panel;
    float* cj = c + j * c_panel;
    switch (width) {
#if defined(__AVX512F__)
      case 4:
        column<Op, tile_rows(4), 4, kAdd>(m, a, bj, b_panel, cj, c_panel, k);
        break;
      case 3:
        column<Op, tile_rows(3), 3, kAdd>(m, a, bj, b_panel, cj, c_panel, k);
        break;
#endif
      case 2:
        column<Op, tile_rows(2), 2, kAdd>(m, a, bj, b_panel, cj, c_panel, k);
        break;
      default:
        column<Op, tile_rows(1), 1, kAdd>(m, a, bj, b_panel, cj, c_panel, k);
        break;
    }
    j += width;
  }
}

// What products need set up on a thread; nothing without matrix tiles.
template <class Op>
struct ProductScope {
  ProductScope() {}
};

#if defined(__AMX_BF16__)
constexpr int64_t kTileWords = 16 * 16;  // of a tile: 16 rows of 64 bytes

// Products in a scope of their own: sets tiles to 16 full rows, and leaves the configuration found
// before, on which other libraries on this thread may rely.
template <>
class ProductScope<Pairs> {
 public:
  ProductScope() {
    // Not the intrinsics: those of GCC 12 hide what they read and write from the compiler.
    asm volatile("sttilecfg %0" : "=m"(before_));
    Config config{};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = 64;
      config.rows[t] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~ProductScope() {
    // Palette 0 is the initial state; loading it releases the tiles.
    asm volatile("ldtilecfg %0" ::"m"(before_));
  }
  ProductScope(const ProductScope&) = delete;
  ProductScope& operator=(const ProductScope&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Config before_;
};

// Keeps accesses to memory on their side: GCC does not see those of the tile intrinsics.
UML_INLINE void fence_compiler() { asm volatile("" ::: "memory"); }

// C[kRows x kCols tiles] (+)= A[kRows, steps] B[steps, kCols]; tiles 0..3 hold C, 4 and 5 A,
// 6 and 7 B.
template <int kRows, int kCols, bool kAdd>
UML_INLINE void amx_tile(const float* a, int64_t a_panel, const float* b, int64_t b_panel, float* c,
                         int64_t c_panel, int64_t steps) {
  if constexpr (kAdd) {
    _tile_loadd(0, c, 64);
    if constexpr (kCols == 2) _tile_loadd(1, c + c_panel, 64);
    if constexpr (kRows == 2) _tile_loadd(2, c + kTileWords, 64);
    if constexpr (kRows == 2 && kCols == 2) _tile_loadd(3, c + kTileWords + c_panel, 64);
  } else {
    _tile_zero(0);
    if constexpr (kCols == 2) _tile_zero(1);
    if constexpr (kRows == 2) _tile_zero(2);
    if constexpr (kRows == 2 && kCols == 2) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += a_panel, b += kTileWords) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kCols == 2) {
      _tile_loadd(7, b + b_panel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, a + kTileWords, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRows == 2 && kCols == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  if constexpr (kCols == 2) _tile_stored(1, c + c_panel, 64);
  if constexpr (kRows == 2) _tile_stored(2, c + kTileWords, 64);
  if constexpr (kRows == 2 && kCols == 2) _tile_stored(3, c + kTileWords + c_panel, 64);
}

template <int kCols, bool kAdd>
UML_INLINE void amx_column(int64_t m, Operand a, const float* b, int64_t b_panel, float* c,
                           int64_t c_panel, int64_t steps) {
  int64_t i = 0;
  for (; i + 16 < m; i += 32) {
    amx_tile<2, kCols, kAdd>(a.data + i * 16, a.panel, b, b_panel, c + i * 16, c_panel, steps);
  }
  if (i < m) {
    amx_tile<1, kCols, kAdd>(a.data + i * 16, a.panel, b, b_panel, c + i * 16, c_panel, steps);
  }
}

// Works on whole tiles: rows beyond m and words beyond k up to multiples of 16 are read (they must
// exist, the words be zero in A or B and finite in the other), and those rows of C are written.
template <bool kAdd>
void amx_product(int64_t m, int64_t panels, int64_t k, Operand a, const float* b, int64_t b_panel,
                 float* c, int64_t c_panel) {
  const int64_t steps = (k + 15) / 16;
  fence_compiler();
  int64_t j = 0;
  for (; j + 1 < panels; j += 2) {
    amx_column<2, kAdd>(m, a, b + j * b_panel, b_panel, c + j * c_panel, c_panel, steps);
  }
  if (j < panels) {
    amx_column<1, kAdd>(m, a, b + j * b_panel, b_panel, c + j * c_panel, c_panel, steps);
  }
  fence_compiler();
}
#endif

template <class Op, bool kAdd>
UML_INLINE void product(int64_t m, int64_t panels, int64_t k, Operand a, const float* b,
                        int64_t b_panel, float* c, int64_t c_panel) {
#if defined(__AMX_BF16__)
  if constexpr (Op::kPerWord == 2) {
    return amx_product<kAdd>(m, panels, k, a, b, b_panel, c, c_panel);
  }
#endif
  vector_product<Op, kAdd>(m, panels, k, a, b, b_panel, c, c_panel);
}

}  // namespace uml::UML_ARCH
