// Attention inside ragged segments, one task per (segment, head).
//
// A task copies its rows of query, key and value to fp32 scratch and works on blocks of query rows
// against all keys of the segment, so scores are complete rows and softmax needs one pass.
// Everything is one small matrix product, C = A * B, whose B is padded to whole vectors and whose A
// is read element by element with any strides.
#include "kernel_parts.h"
#include "parallel.h"
#include "simd.h"

namespace uml::UML_ARCH {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 6;  // 6 x 4 accumulators + 4 columns + 1 broadcast of 32 registers
#else
constexpr int kTileRows = 4;  // 4 x 2 accumulators + 2 columns + 1 broadcast of 16 registers
#endif
constexpr int64_t kScoreFloats =
    8192;  // scores of a query block: 32 KiB, beside the operands in a 1 MiB L2

struct Strided {
  const float* data;
  int64_t row;
  int64_t col;
};

// C[kRows, kCols vectors] (+)= A[kRows, k0:k1] B[k0:k1, :].
template <int kRows, int kCols, bool kAdd>
UML_INLINE void tile(Strided a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                     int64_t k0, int64_t k1) {
  Vec acc[kRows][kCols];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kCols; ++j) acc[i][j] = kAdd ? load(c + i * c_stride + j * kWidth) : Vec{};
  }
  for (int64_t k = k0; k < k1; ++k) {
    Vec bk[kCols];
    for (int j = 0; j < kCols; ++j) bk[j] = load(b + k * b_stride + j * kWidth);
    for (int i = 0; i < kRows; ++i) {
      const Vec ak = splat(a.data[i * a.row + k * a.col]);
      for (int j = 0; j < kCols; ++j) acc[i][j] += ak * bk[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kCols; ++j) store(c + i * c_stride + j * kWidth, acc[i][j]);
  }
}

template <int kRows, bool kAdd>
void strip(Strided a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t n,
           int64_t k0, int64_t k1) {
  int64_t j = 0;
  for (; j + kRegisterColumns * kWidth <= n; j += kRegisterColumns * kWidth) {
    tile<kRows, kRegisterColumns, kAdd>(a, b + j, b_stride, c + j, c_stride, k0, k1);
  }
  switch ((n - j) / kWidth) {
    case 3:
      tile<kRows, kRegisterColumns == 4 ? 3 : 1, kAdd>(a, b + j, b_stride, c + j, c_stride, k0, k1);
      break;
    case 2:
      tile<kRows, 2, kAdd>(a, b + j, b_stride, c + j, c_stride, k0, k1);
      break;
    case 1:
      tile<kRows, 1, kAdd>(a, b + j, b_stride, c + j, c_stride, k0, k1);
      break;
    default:
      break;
  }
}

template <bool kAdd>
void strip_of(int64_t rows, Strided a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
              int64_t n, int64_t k0, int64_t k1) {
  switch (rows) {
#if defined(__AVX512F__)
    case 6:
      return strip<6, kAdd>(a, b, b_stride, c, c_stride, n, k0, k1);
    case 5:
      return strip<5, kAdd>(a, b, b_stride, c, c_stride, n, k0, k1);
#endif
    case 4:
      return strip<4, kAdd>(a, b, b_stride, c, c_stride, n, k0, k1);
    case 3:
      return strip<3, kAdd>(a, b, b_stride, c, c_stride, n, k0, k1);
    case 2:
      return strip<2, kAdd>(a, b, b_stride, c, c_stride, n, k0, k1);
    default:
      return strip<1, kAdd>(a, b, b_stride, c, c_stride, n, k0, k1);
  }
}

// C[0:m] (+)= A B for strips of rows; bounds(i, end, n, k0, k1) may shrink the default ranges of
// the strip [i, end).
template <bool kAdd, class Bounds>
UML_INLINE void product(int64_t m, int64_t n, int64_t k, Strided a, const float* b,
                        int64_t b_stride, float* c, int64_t c_stride, Bounds bounds) {
  for (int64_t i = 0; i < m; i += kTileRows) {
    const int64_t rows = smaller(kTileRows, m - i);
    int64_t strip_n = n, k0 = 0, k1 = k;
    bounds(i, i + rows, strip_n, k0, k1);
    strip_of<kAdd>(rows, {a.data + i * a.row, a.row, a.col}, b, b_stride, c + i * c_stride,
                   c_stride, strip_n, k0, k1);
  }
}

// dst (rows, cols rounded up to vectors) = src, padded with zeros.
template <class T>
void copy_rows(const T* src, int64_t stride, int64_t rows, int64_t cols, float* dst,
               int64_t dst_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < cols; c += kWidth) {
      store(dst + i * dst_stride + c, load_n(src + i * stride + c, cols - c));
    }
  }
}

// kWidth rows of n (at most kWidth) columns of src, zeros behind them and below row `rows`.
template <class T>
UML_INLINE void load_block(const T* src, int64_t stride, int64_t rows, int64_t n, Vec* block) {
  if (rows >= kWidth && n == kWidth) {
    for (int r = 0; r < kWidth; ++r) block[r] = load(src + r * stride);
  } else if (rows >= kWidth) {
    for (int r = 0; r < kWidth; ++r) block[r] = load_part(src + r * stride, n);
  } else {
    for (int r = 0; r < kWidth; ++r) block[r] = r < rows ? load_n(src + r * stride, n) : Vec{};
  }
}

// dst (cols, rows rounded up to vectors) = transpose of src, padded with zeros.
template <class T>
void copy_transposed(const T* src, int64_t stride, int64_t rows, int64_t cols, float* dst,
                     int64_t dst_stride) {
  for (int64_t c = 0; c < cols; c += kWidth) {
    const int64_t n = smaller(kWidth, cols - c);
    for (int64_t i = 0; i < rows; i += kWidth) {
      Vec block[kWidth];
      load_block(src + i * stride + c, stride, rows - i, n, block);
      transpose(block);
      float* d = dst + c * dst_stride + i;
      if (n == kWidth) {
        for (int r = 0; r < kWidth; ++r) store(d + r * dst_stride, block[r]);
      } else {
        for (int64_t r = 0; r < n; ++r) store(d + r * dst_stride, block[r]);
      }
    }
  }
}

template <class T>
void write_rows(const float* src, int64_t src_stride, int64_t rows, int64_t cols, T* dst,
                int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < cols; c += kWidth) {
      store_n(dst + i * stride + c, load(src + i * src_stride + c), cols - c);
    }
  }
}

// One (segment, head): sizes, strides of its scratch and its place in the mask.
struct Task {
  int64_t first;   // row of the segment's first token
  int64_t length;  // L
  int64_t head;
  int64_t dim;  // D
  int64_t padded_length;
  int64_t padded_dim;
  int64_t block;  // query rows per block

  UML_INLINE Task(const AttentionShape& shape, int64_t index) {
    const int64_t segment = index / shape.heads;
    head = index % shape.heads;
    first = shape.offsets[segment];
    length = shape.offsets[segment + 1] - first;
    dim = shape.head_dim;
    padded_length = round_up(length, kWidth);
    padded_dim = round_up(dim, kWidth);
    block =
        length > 0 ? larger(kTileRows, kScoreFloats / padded_length / kTileRows * kTileRows) : 0;
    block = smaller(block, length);
  }

  // Keys that query row i sees.
  UML_INLINE int64_t keys(bool is_causal, int64_t i) const { return is_causal ? i + 1 : length; }
};

// Multiplies the first n of a row of probabilities by the keep factors of mask row `row`.
template <class Use>
UML_INLINE void for_each_factor(const Dropout& drop, int64_t row, int64_t cols, int64_t n,
                                Use use) {
  const RowMask mask(drop, row, cols);
  for (int64_t j = 0; j < n; j += 2 * kWidth) {
    Vec m0, m1;
    mask.factors(j, m0, m1);
    use(j, m0);
    if (j + kWidth < n) use(j + kWidth, m1);
  }
}

// Row of scores to probabilities times keep factors; zero in [n, end of its vectors). Returns
// log-sum-exp.
UML_INLINE float softmax_row(float* s, float scale, int64_t n, int64_t width, const Dropout& drop,
                             int64_t mask_row, int64_t mask_cols) {
  const Vec lowest = splat(-3.0e38f);
  Vec top = lowest;
  for (int64_t j = 0; j < n; j += kWidth) {
    Vec v = load(s + j) * scale;
    if (j + kWidth > n) v = iota() < static_cast<int32_t>(n - j) ? v : lowest;
    top = vmax(v, top);
  }
  const float m = max(top);
  Vec total{};
  for (int64_t j = 0; j < n; j += kWidth) {
    Vec e = exp(load(s + j) * scale - m);
    if (j + kWidth > n) e = iota() < static_cast<int32_t>(n - j) ? e : Vec{};
    store(s + j, e);
    total += e;
  }
  for (int64_t j = round_up(n, kWidth); j < width; j += kWidth) store(s + j, Vec{});
  const float z = sum(total), inverse = 1.0f / z;
  if (drop.threshold > 0) {
    for_each_factor(drop, mask_row, mask_cols, n,
                    [&](int64_t j, Vec keep) { store(s + j, load(s + j) * keep * inverse); });
  } else {
    for (int64_t j = 0; j < n; j += kWidth) store(s + j, load(s + j) * inverse);
  }
  return m + __builtin_logf(z);
}

template <class T>
void fwd_task(const AttentionShape& shape, const Task& t, const T* query, const T* key,
              const T* value, T* out, float* lse, const Dropout& drop) {
  const int64_t L = t.length, D = t.dim, LP = t.padded_length, DP = t.padded_dim;
  const bool causal = shape.is_causal;
  float* key_T = thread_scratch(DP * LP + L * DP + t.block * (2 * DP + LP));
  float* v = key_T + DP * LP;
  float* q = v + L * DP;
  float* o = q + t.block * DP;
  float* s = o + t.block * DP;
  const int64_t at = t.first * shape.qkv_stride + t.head * D;
  copy_transposed(key + at, shape.qkv_stride, L, D, key_T, LP);
  copy_rows(value + at, shape.qkv_stride, L, D, v, DP);
  for (int64_t i0 = 0; i0 < L; i0 += t.block) {
    const int64_t m = smaller(t.block, L - i0);
    copy_rows(query + at + i0 * shape.qkv_stride, shape.qkv_stride, m, D, q, DP);
    product<false>(m, LP, D, {q, DP, 1}, key_T, LP, s, LP,
                   [&](int64_t, int64_t end, int64_t& n, int64_t&, int64_t&) {
                     if (causal) n = round_up(i0 + end, kWidth);
                   });
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = (t.first + i0 + i) * shape.heads + t.head;
      lse[row] = softmax_row(s + i * LP, shape.scale, t.keys(causal, i0 + i), LP, drop, row,
                             shape.max_len);
    }
    product<false>(m, DP, L, {s, LP, 1}, v, DP, o, DP,
                   [&](int64_t, int64_t end, int64_t&, int64_t&, int64_t& k1) {
                     if (causal) k1 = i0 + end;
                   });
    write_rows(o, DP, m, D, out + ((t.first + i0) * shape.heads + t.head) * D, shape.heads * D);
  }
}

// From a row of scores and of dO V^T: scores become probabilities times keep factors (for the
// gradient of value), `grad` becomes the gradient of the unscaled scores. Probabilities are
// normalised again, since the rounding of a large lse would cost most of their digits. `factors`:
// scratch.
UML_INLINE void softmax_bwd_row(float* s, float* grad, float* factors, float scale, int64_t n,
                                int64_t width, float lse, const Dropout& drop, int64_t mask_row,
                                int64_t mask_cols) {
  Vec dot{}, total{};
  const auto row = [&](int64_t j, Vec keep) {
    Vec e = exp(load(s + j) * scale - lse);
    if (j + kWidth > n) e = iota() < static_cast<int32_t>(n - j) ? e : Vec{};
    const Vec kept = load(grad + j) * keep;
    total += e;
    dot += e * kept;
    store(s + j, e);
    store(grad + j, kept);
    store(factors + j, keep);
  };
  if (drop.threshold > 0) {
    for_each_factor(drop, mask_row, mask_cols, n, row);
  } else {
    for (int64_t j = 0; j < n; j += kWidth) row(j, splat(1.0f));
  }
  const float inverse = 1.0f / sum(total), delta = sum(dot) * inverse;
  for (int64_t j = 0; j < n; j += kWidth) {
    const Vec p = load(s + j) * inverse;
    store(s + j, p * load(factors + j));
    store(grad + j, p * (load(grad + j) - delta) * scale);
  }
  for (int64_t j = round_up(n, kWidth); j < width; j += kWidth) {
    store(s + j, Vec{});
    store(grad + j, Vec{});
  }
}

template <class T>
void bwd_task(const AttentionShape& shape, const Task& t, const T* grad_out, const T* query,
              const T* key, const T* value, const float* lse, T* grad_query, T* grad_key,
              T* grad_value, int64_t grad_stride, const Dropout& drop) {
  const int64_t L = t.length, D = t.dim, LP = t.padded_length, DP = t.padded_dim;
  const bool causal = shape.is_causal;
  float* key_T = thread_scratch(2 * DP * LP + 3 * L * DP + t.block * (3 * DP + 2 * LP) + LP);
  float* value_T = key_T + DP * LP;
  float* k = value_T + DP * LP;
  float* dk = k + L * DP;
  float* dv = dk + L * DP;
  float* q = dv + L * DP;
  float* go = q + t.block * DP;
  float* dq = go + t.block * DP;
  float* s = dq + t.block * DP;
  float* ds = s + t.block * LP;
  float* factors = ds + t.block * LP;
  const int64_t at = t.first * shape.qkv_stride + t.head * D;
  copy_transposed(key + at, shape.qkv_stride, L, D, key_T, LP);
  copy_transposed(value + at, shape.qkv_stride, L, D, value_T, LP);
  copy_rows(key + at, shape.qkv_stride, L, D, k, DP);
  for (int64_t i = 0; i < 2 * L * DP; i += kWidth) store(dk + i, Vec{});
  for (int64_t i0 = 0; i0 < L; i0 += t.block) {
    const int64_t m = smaller(t.block, L - i0);
    const int64_t out_at = ((t.first + i0) * shape.heads + t.head) * D;
    copy_rows(query + at + i0 * shape.qkv_stride, shape.qkv_stride, m, D, q, DP);
    copy_rows(grad_out + out_at, shape.heads * D, m, D, go, DP);
    const auto seen_columns = [&](int64_t, int64_t end, int64_t& n, int64_t&, int64_t&) {
      if (causal) n = round_up(i0 + end, kWidth);
    };
    product<false>(m, LP, D, {q, DP, 1}, key_T, LP, s, LP, seen_columns);
    product<false>(m, LP, D, {go, DP, 1}, value_T, LP, ds, LP, seen_columns);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = (t.first + i0 + i) * shape.heads + t.head;
      softmax_bwd_row(s + i * LP, ds + i * LP, factors, shape.scale, t.keys(causal, i0 + i), LP,
                      lse[row], drop, row, shape.max_len);
    }
    product<false>(m, DP, L, {ds, LP, 1}, k, DP, dq, DP,
                   [&](int64_t, int64_t end, int64_t&, int64_t&, int64_t& k1) {
                     if (causal) k1 = i0 + end;
                   });
    write_rows(dq, DP, m, D, grad_query + (t.first + i0) * grad_stride + t.head * D, grad_stride);
    const int64_t seen_keys = causal ? i0 + m : L;
    const auto seeing_rows = [&](int64_t begin, int64_t, int64_t&, int64_t& k0, int64_t&) {
      if (causal) k0 = larger(0, begin - i0);
    };
    product<true>(seen_keys, DP, m, {ds, 1, LP}, q, DP, dk, DP, seeing_rows);
    product<true>(seen_keys, DP, m, {s, 1, LP}, go, DP, dv, DP, seeing_rows);
  }
  const int64_t grad_at = t.first * grad_stride + t.head * D;
  write_rows(dk, DP, L, D, grad_key + grad_at, grad_stride);
  write_rows(dv, DP, L, D, grad_value + grad_at, grad_stride);
}

constexpr int64_t kTasksPerChunk = 8;  // of MOSI's shape about 20 us

// Chunks of tasks; longer segments than the usual few dozen rows are handed out one by one.
int64_t tasks_per_chunk(const AttentionShape& shape) {
  return shape.max_len > 64 ? 1 : kTasksPerChunk;
}

}  // namespace

void attention_fwd(int threads, AttentionShape shape, const void* query, const void* key,
                   const void* value, void* out, float* lse, Dropout drop) {
  with_type(shape.dtype, [&]<class T>(T*) {
    parallel_for(threads, shape.segments * shape.heads, tasks_per_chunk(shape),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const Task task(shape, i);
                     if (task.length == 0) continue;
                     fwd_task(shape, task, static_cast<const T*>(query), static_cast<const T*>(key),
                              static_cast<const T*>(value), static_cast<T*>(out), lse, drop);
                   }
                 });
  });
}

void attention_bwd(int threads, AttentionShape shape, const void* grad_out, const void* query,
                   const void* key, const void* value, const float* lse, void* grad_query,
                   void* grad_key, void* grad_value, int64_t grad_stride, Dropout drop) {
  with_type(shape.dtype, [&]<class T>(T*) {
    parallel_for(threads, shape.segments * shape.heads, tasks_per_chunk(shape),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const Task task(shape, i);
                     if (task.length == 0) continue;
                     bwd_task(shape, task, static_cast<const T*>(grad_out),
                              static_cast<const T*>(query), static_cast<const T*>(key),
                              static_cast<const T*>(value), lse, static_cast<T*>(grad_query),
                              static_cast<T*>(grad_key), static_cast<T*>(grad_value), grad_stride,
                              drop);
                   }
                 });
  });
}

}  // namespace uml::UML_ARCH
