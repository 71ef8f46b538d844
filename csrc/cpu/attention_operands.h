// Rows of query, key, value and of gradients, to and from the packed operands of
// attention_products.h. Unused words are zero.
#pragma once

#include "attention_products.h"

namespace uml::UML_ARCH {

// Words of n values in the summed dimension, and the same padded to whole panels.
template <class Op>
UML_INLINE int64_t words(int64_t n) {
  return (n + Op::kPerWord - 1) / Op::kPerWord;
}
template <class Op>
UML_INLINE int64_t padded_words(int64_t n) {
  return round_up(words<Op>(n), kWidth);
}

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  int64_t rows;
  int64_t cols;
};

// The packing of one kind of word: sizes in words, and functions that fill that much.
template <class Op>
struct Pack;

template <>
struct Pack<Singles> {
  static int64_t rows_words(int64_t rows, int64_t cols) { return rows * round_up(cols, kWidth); }
  static int64_t columns_words(int64_t rows, int64_t cols) { return rows_words(rows, cols); }

  // A operand of src.
  template <class T>
  static Operand rows(Matrix<T> src, float* a) {
    const int64_t width = round_up(src.cols, kWidth);
    for (int64_t i = 0; i < src.rows; ++i) {
      for (int64_t c = 0; c < src.cols; c += kWidth) {
        store(a + i * width + c, load_n(src.data + i * src.stride + c, src.cols - c));
      }
    }
    return {a, width, 1, kWidth};
  }

  // A operand of the transpose of src; `packed` is that of src where there is one.
  template <class T>
  static Operand columns(Matrix<T> src, float* a, const Operand* packed) {
    const Operand by_row = packed ? *packed : rows(src, a);
    return {by_row.data, 1, by_row.row, kWidth * by_row.row};
  }

  // B operand of the transpose: a panel for kWidth rows of src.
  template <class T>
  static void transposed(Matrix<T> src, float* b) {
    const int64_t depth = padded_words<Singles>(src.cols);
    for (int64_t i = 0; i < src.rows; i += kWidth, b += depth * kWidth) {
      const int64_t n = smaller(kWidth, src.rows - i);
      for (int64_t c = 0; c < src.cols; c += kWidth) {
        Vec block[kWidth];
        for (int64_t r = 0; r < kWidth; ++r) {
          block[r] = r < n ? load_n(src.data + (i + r) * src.stride + c, src.cols - c) : Vec{};
        }
        transpose(block);
        for (int r = 0; r < kWidth; ++r) store(b + (c + r) * kWidth, block[r]);
      }
    }
  }

  // B operand of src: a panel for kWidth columns.
  template <class T>
  static void panels(Matrix<T> src, float* b) {
    const int64_t depth = padded_words<Singles>(src.rows);
    for (int64_t i = 0; i < src.rows; ++i, b += kWidth) {
      const T* from = src.data + i * src.stride;
      for (int64_t c = 0; c < src.cols; c += kWidth) {
        store(b + c * depth, load_n(from + c, src.cols - c));
      }
    }
  }
};

#if defined(__AVX512BF16__)
UML_INLINE uint32_t first_bits(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// Words (a[0], b[0]), (a[1], b[1]), ...; with the conversion that from_bf16 takes, for its reason.
UML_INLINE Vec interleave_pairs(__m256i a, __m256i b) {
  const VecU low = (VecU)_mm512_maskz_cvtepu16_epi32(0xFFFF, a);
  const VecU high = (VecU)_mm512_maskz_cvtepu16_epi32(0xFFFF, b);
  return (Vec)(low | high << 16);
}

// Of the first n columns of two rows; b null for zeros.
UML_INLINE Vec load_pairs(const bf16* a, const bf16* b, int64_t n) {
  const __mmask16 mask = static_cast<__mmask16>(first_bits(n));
  return interleave_pairs(_mm256_maskz_loadu_epi16(mask, a),
                          _mm256_maskz_loadu_epi16(b ? mask : 0, b));
}

UML_INLINE Vec round_to_pairs(Vec a, Vec b) {
  return interleave_pairs((__m256i)to_bf16(a), (__m256i)to_bf16(b));
}

template <>
struct Pack<Pairs> {
  static int64_t rows_words(int64_t rows, int64_t cols) {
    return round_up(rows, kWidth) * padded_words<Pairs>(cols);
  }
  static int64_t columns_words(int64_t rows, int64_t cols) {
    return round_up(cols, kWidth) * padded_words<Pairs>(rows);
  }

  static Operand rows(Matrix<bf16> src, float* a) {
    const int64_t panel = round_up(src.rows, kWidth) * kWidth;
    for (int64_t i = 0; i < src.rows; ++i) {
      const bf16* from = src.data + i * src.stride;
      float* to = a + i * kWidth;
      for (int64_t c = 0; c < src.cols; c += 2 * kWidth, to += panel) {
        store(to, (Vec)_mm512_maskz_loadu_epi16(first_bits(src.cols - c), from + c));
      }
    }
    for (int64_t c = 0; c < src.cols; c += 2 * kWidth) {
      float* to = a + c / (2 * kWidth) * panel;
      for (int64_t i = src.rows * kWidth; i < panel; i += kWidth) store(to + i, Vec{});
    }
    return {a, kWidth, 1, panel};
  }

  static Operand columns(Matrix<bf16> src, float* a, const Operand*) {
    const int64_t panel = round_up(src.cols, kWidth) * kWidth;
    for (int64_t i = 0; i < src.rows; i += 2 * kWidth) {
      float* d = a + i / (2 * kWidth) * panel;
      for (int64_t c = 0; c < src.cols; c += kWidth, d += kWidth * kWidth) {
        Vec block[kWidth];
        for (int64_t r = 0; r < kWidth; ++r) block[r] = pair_of_rows(src, i + 2 * r, c);
        transpose(block);
        for (int r = 0; r < kWidth; ++r) store(d + r * kWidth, block[r]);
      }
    }
    return {a, kWidth, 1, panel};
  }

  static void transposed(Matrix<bf16> src, float* b) {
    const int64_t depth = padded_words<Pairs>(src.cols);
    for (int64_t i = 0; i < src.rows; i += kWidth, b += depth * kWidth) {
      const int64_t n = smaller(kWidth, src.rows - i);
      for (int64_t c = 0; c < src.cols; c += 2 * kWidth) {
        Vec block[kWidth];
        for (int64_t r = 0; r < kWidth; ++r) {
          block[r] = (Vec)_mm512_maskz_loadu_epi16(r < n ? first_bits(src.cols - c) : 0,
                                                   src.data + (i + r) * src.stride + c);
        }
        transpose(block);
        for (int r = 0; r < kWidth; ++r) store(b + (c / 2 + r) * kWidth, block[r]);
      }
    }
  }

  static void panels(Matrix<bf16> src, float* b) {
    const int64_t depth = padded_words<Pairs>(src.rows);
    for (int64_t w = 0; w < depth; ++w, b += kWidth) {
      for (int64_t c = 0; c < src.cols; c += kWidth) {
        store(b + c * depth, pair_of_rows(src, 2 * w, c));
      }
    }
  }

 private:
  UML_INLINE static Vec pair_of_rows(Matrix<bf16> src, int64_t i, int64_t c) {
    if (i >= src.rows) return Vec{};
    const bf16* a = src.data + i * src.stride + c;
    return load_pairs(a, i + 1 < src.rows ? a + src.stride : nullptr, src.cols - c);
  }
};
#endif

// dst (rows, cols) = C in panels of `depth` rows. Row after row: dst is cold, its rows far apart.
template <class T>
UML_INLINE void write_rows(const float* c, int64_t depth, int64_t rows, int64_t cols, T* dst,
                           int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, c += kWidth, dst += stride) {
    for (int64_t j = 0; j < cols; j += kWidth) store_n(dst + j, load(c + j * depth), cols - j);
  }
}

// dst (rows, cols) = the transpose of C (cols, rows) in panels of `depth` rows, which is
// overwritten; row i times factor[i], null for 1.
template <class T>
UML_INLINE void write_transposed(float* c, int64_t depth, const float* factor, int64_t rows,
                                 int64_t cols, T* dst, int64_t stride) {
  for (int64_t i = 0; i < rows; i += kWidth, c += depth * kWidth) {
    const Vec scale = factor ? load(factor + i) : splat(1.0f);
    for (int64_t j = 0; j < cols; j += kWidth) {
      Vec block[kWidth];
      for (int r = 0; r < kWidth; ++r) block[r] = load(c + (j + r) * kWidth) * scale;
      transpose(block);
      for (int r = 0; r < kWidth; ++r) store(c + (j + r) * kWidth, block[r]);
    }
    write_rows(c, kWidth, smaller(kWidth, rows - i), cols, dst + i * stride, stride);
  }
}

}  // namespace uml::UML_ARCH
