// Attention inside ragged segments, one task per (segment, head).
//
// A task works on blocks of queries against all keys that they see, and on scores transposed: keys
// are rows, queries are lanes. So softmax needs one pass over a block and no sums across lanes, no
// lane is wasted on a narrow head, and what has to be transposed are rows of query, key, value and
// their gradients instead of scores. With S^T = K Q^T:
//   forward   O^T = V^T P^T
//   backward  dP^T = V dO^T,  dV = P^T dO,  dK = dS^T Q,  dQ^T = K^T dS^T
// bf16 is multiplied in pairs where the processor can (with P and dS rounded to bf16), else in
// fp32.

#include "attention_softmax.h"
#include "kernel_parts.h"
#include "parallel.h"

namespace uml::UML_ARCH {
namespace {

// How a task's queries are cut into blocks of panels (kWidth queries).
struct Blocking {
  int64_t unit;   // panels that products take at a time
  int64_t most;   // panels of a block
  int64_t words;  // scores of a block, which should stay in the cache
};

template <class Op>
constexpr Blocking kForward = {kRegisterColumns, kRegisterColumns, 1 << 14};
template <class Op>
constexpr Blocking kBackward = {kRegisterColumns, kRegisterColumns, 1 << 15};
#if defined(__AMX_BF16__)
template <>
constexpr Blocking kForward<Pairs> = {2, 8, 1 << 13};
template <>
constexpr Blocking kBackward<Pairs> = {2, 8, 1 << 15};
#endif

// One (segment, head) and the blocks of its queries.
struct Task {
  int64_t first;   // row of the segment's first token
  int64_t length;  // L
  int64_t head;
  int64_t dim;            // D
  int64_t padded_length;  // of whole vectors
  int64_t padded_dim;
  int64_t blocks;
  int64_t units;
  int64_t unit;
  int64_t block_panels;  // of the largest block

  UML_INLINE Task(const AttentionShape& shape, int64_t segment, int64_t head_index,
                  Blocking blocking) {
    head = head_index;
    first = shape.offsets[segment];
    length = shape.offsets[segment + 1] - first;
    dim = shape.head_dim;
    padded_length = round_up(length, kWidth);
    padded_dim = round_up(dim, kWidth);
    unit = blocking.unit;
    const int64_t panels = padded_length / kWidth;
    units = (panels + unit - 1) / unit;
    const int64_t fitting = blocking.words / larger(1, padded_length * kWidth * unit);
    const int64_t block_units = larger(1, smaller(fitting, blocking.most / unit));
    blocks = (units + block_units - 1) / block_units;
    block_panels = blocks ? smaller(panels, (units + blocks - 1) / blocks * unit) : 0;
  }

  // First query of a block; that of `blocks` is L.
  UML_INLINE int64_t begin(int64_t block) const {
    return smaller(length, block * units / blocks * unit * kWidth);
  }
};

// Queries [begin, end) of a task.
struct Block {
  int64_t begin;
  int64_t rows;
  int64_t panels;
  int64_t keys;  // that any of them sees

  UML_INLINE Block(const Task& task, int64_t index, bool is_causal) {
    begin = task.begin(index);
    const int64_t end = task.begin(index + 1);
    rows = end - begin;
    panels = (rows + kWidth - 1) / kWidth;
    keys = is_causal ? end : task.length;
  }
};

// Scratch memory for arrays of these sizes in words.
template <int kCount>
UML_INLINE void carve(const int64_t (&sizes)[kCount], float* (&arrays)[kCount]) {
  int64_t total = 0;
  for (int64_t size : sizes) total += round_up(size, 16);
  float* next = thread_scratch(total);
  for (int i = 0; i < kCount; ++i) {
    arrays[i] = next;
    next += round_up(sizes[i], 16);
  }
}

// The mask of the queries from `query` on.
UML_INLINE PanelMask panel_mask(const AttentionShape& shape, const Task& t, const Dropout& drop,
                                int64_t query) {
  return {drop, (t.first + query) * shape.heads + t.head, shape.heads, shape.max_len};
}

// Where softmax writes the probabilities of a panel, and the gradients of its scores.
template <class Op>
struct Layout;

template <>
struct Layout<Singles> {
  static constexpr bool kInPlace = true;
  static Operand queries_summed(const float* panels, int64_t padded_length) {
    return {panels, kWidth, 1, padded_length * kWidth};
  }
  static ScoreGradients<Singles> gradients(float* p, float* ds, float*, int64_t panel,
                                           int64_t padded_length) {
    const int64_t at = panel * padded_length * kWidth;
    return {p + at, ds + at};
  }
};

#if defined(__AVX512BF16__)
template <>
struct Layout<Pairs> {
  static constexpr bool kInPlace = false;
  static Operand queries_summed(const float* panels, int64_t padded_length) {
    return {panels, kWidth, 1, padded_length * kWidth};
  }
  // Two panels of queries share the words of one panel of A.
  static ScoreGradients<Pairs> gradients(float* p, float* ds, float* ds_b, int64_t panel,
                                         int64_t padded_length) {
    const int64_t at = panel / 2 * padded_length * 2 * kWidth + panel % 2 * kWidth;
    return {reinterpret_cast<bf16*>(p) + at, reinterpret_cast<bf16*>(ds) + at, ds_b};
  }
};
#endif

template <class Op, class T>
void fwd_task(const AttentionShape& shape, const Task& t, const T* query, const T* key,
              const T* value, T* out, float* lse, const Dropout& drop) {
  constexpr bool kInPlace = Layout<Op>::kInPlace;
  const int64_t L = t.length, D = t.dim, LP = t.padded_length, DP = t.padded_dim;
  const int64_t panels = t.block_panels, stride = shape.qkv_stride, H = shape.heads;
  const int64_t q_panel = padded_words<Op>(D) * kWidth, s_panel = LP * kWidth;
  const int64_t p_panel = padded_words<Op>(L) * kWidth, o_panel = DP * kWidth;
  float* arrays[7];
  carve({Pack<Op>::rows_words(L, D), Pack<Op>::columns_words(L, D), panels * q_panel,
         panels * s_panel, kInPlace ? 0 : panels * p_panel, panels * o_panel, panels * kWidth},
        arrays);
  const auto [key_words, value_words, q, s, separate_p, o, inverse] = arrays;
  float* p = kInPlace ? s : separate_p;
  const int64_t at = t.first * stride + t.head * D;
  const Operand k = Pack<Op>::rows(Matrix<T>{key + at, stride, L, D}, key_words);
  const Operand v_T = Pack<Op>::columns(Matrix<T>{value + at, stride, L, D}, value_words, nullptr);
  for (int64_t index = 0; index < t.blocks; ++index) {
    const Block b(t, index, shape.is_causal);
    Pack<Op>::transposed(Matrix<T>{query + at + b.begin * stride, stride, b.rows, D}, q);
    product<Op, false>(b.keys, b.panels, words<Op>(D), k, q, q_panel, s, s_panel);
    for (int64_t c = 0; c < b.panels; ++c) {
      const int64_t i = b.begin + c * kWidth;
      const Seen seen(shape.is_causal, i, L);
      const Probabilities<Op> to{p + c * p_panel};
      SoftmaxSums sums;
      if (drop.threshold > 0) {
        const PanelMask mask = panel_mask(shape, t, drop, i);
        sums = softmax_panel<Op, true>(s + c * s_panel, shape.scale, seen, b.keys, &mask, to);
      } else {
        sums = softmax_panel<Op, false>(s + c * s_panel, shape.scale, seen, b.keys, nullptr, to);
      }
      store(inverse + c * kWidth, sums.inverse);
      for (int r = 0; r < kWidth && i + r < L; ++r) {
        lse[(t.first + i + r) * H + t.head] = sums.lse[r];
      }
    }
    product<Op, false>(D, b.panels, words<Op>(b.keys), v_T, p, p_panel, o, o_panel);
    write_transposed(o, DP, inverse, b.rows, D, out + ((t.first + b.begin) * H + t.head) * D,
                     H * D);
  }
}

template <class Op, class T>
void bwd_task(const AttentionShape& shape, const Task& t, const T* grad_out, const T* query,
              const T* key, const T* value, const float* lse, T* grad_query, T* grad_key,
              T* grad_value, int64_t grad_stride, const Dropout& drop) {
  constexpr bool kInPlace = Layout<Op>::kInPlace;
  const int64_t L = t.length, D = t.dim, LP = t.padded_length, DP = t.padded_dim;
  const int64_t panels = t.block_panels, stride = shape.qkv_stride, H = shape.heads;
  const int64_t most = smaller(L, panels * kWidth);  // queries of a block
  const int64_t q_panel = padded_words<Op>(D) * kWidth, s_panel = LP * kWidth;
  const int64_t ds_panel = padded_words<Op>(L) * kWidth, dq_panel = DP * kWidth;
  const int64_t rows_words = Pack<Op>::rows_words(L, D);
  const int64_t pairs = kInPlace ? 0 : padded_words<Op>(most) * LP;
  float* arrays[15];
  carve(
      {rows_words, rows_words, Pack<Op>::columns_words(L, D), DP * LP, DP * LP, panels * q_panel,
       panels * q_panel, DP * padded_words<Op>(most), DP * padded_words<Op>(most), panels * s_panel,
       panels * s_panel, pairs, pairs, kInPlace ? 0 : panels * ds_panel, panels * dq_panel},
      arrays);
  const auto [key_words, value_words, column_words, dk, dv, q_T, go_T, q, go, s, grad, separate_p,
              separate_ds, separate_ds_b, dq] = arrays;
  float* p = kInPlace ? s : separate_p;
  float* ds = kInPlace ? grad : separate_ds;
  float* ds_b = kInPlace ? grad : separate_ds_b;
  const int64_t at = t.first * stride + t.head * D;
  const Matrix<T> keys{key + at, stride, L, D};
  const Operand k = Pack<Op>::rows(keys, key_words);
  const Operand k_T = Pack<Op>::columns(keys, column_words, &k);
  const Operand v = Pack<Op>::rows(Matrix<T>{value + at, stride, L, D}, value_words);
  const Operand p_A = Layout<Op>::queries_summed(p, LP), ds_A = Layout<Op>::queries_summed(ds, LP);
  // From the last block, which sees every key, so that it starts all sums of dK and dV.
  for (int64_t index = t.blocks - 1; index >= 0; --index) {
    const Block b(t, index, shape.is_causal);
    const int64_t row = t.first + b.begin;
    const Matrix<T> queries{query + at + b.begin * stride, stride, b.rows, D};
    const Matrix<T> grads{grad_out + (row * H + t.head) * D, H * D, b.rows, D};
    Pack<Op>::transposed(queries, q_T);
    Pack<Op>::transposed(grads, go_T);
    Pack<Op>::panels(queries, q);
    Pack<Op>::panels(grads, go);
    product<Op, false>(b.keys, b.panels, words<Op>(D), k, q_T, q_panel, s, s_panel);
    product<Op, false>(b.keys, b.panels, words<Op>(D), v, go_T, q_panel, grad, s_panel);
    for (int64_t c = 0; c < b.panels; ++c) {
      const int64_t i = b.begin + c * kWidth;
      const Seen seen(shape.is_causal, i, L);
      const auto to = Layout<Op>::gradients(p, ds, ds_b + c * ds_panel, c, LP);
      Vec panel_lse{};
      for (int r = 0; r < kWidth && i + r < L; ++r) {
        panel_lse[r] = lse[(t.first + i + r) * H + t.head];
      }
      float *sc = s + c * s_panel, *gc = grad + c * s_panel;
      if (drop.threshold > 0) {
        const PanelMask mask = panel_mask(shape, t, drop, i);
        softmax_bwd_panel<Op, true>(sc, gc, shape.scale, seen, b.keys, panel_lse, &mask, to);
      } else {
        softmax_bwd_panel<Op, false>(sc, gc, shape.scale, seen, b.keys, panel_lse, nullptr, to);
      }
    }
    if constexpr (Op::kPerWord > 1) {
      // The other half of the last words: the zeros of q and go would not silence a NaN.
      if (b.panels % 2) Layout<Op>::gradients(p, ds, ds_b, b.panels, LP).clear_half(0, b.keys);
    }
    product<Op, false>(D, b.panels, words<Op>(b.keys), k_T, ds_b, ds_panel, dq, dq_panel);
    write_transposed(dq, DP, nullptr, b.rows, D, grad_query + row * grad_stride + t.head * D,
                     grad_stride);
    const int64_t q_words = words<Op>(b.rows), depth = padded_words<Op>(b.rows) * kWidth;
    const int64_t columns = DP / kWidth;
    if (index == t.blocks - 1) {
      product<Op, false>(b.keys, columns, q_words, ds_A, q, depth, dk, s_panel);
      product<Op, false>(b.keys, columns, q_words, p_A, go, depth, dv, s_panel);
    } else {
      product<Op, true>(b.keys, columns, q_words, ds_A, q, depth, dk, s_panel);
      product<Op, true>(b.keys, columns, q_words, p_A, go, depth, dv, s_panel);
    }
  }
  const int64_t grad_at = t.first * grad_stride + t.head * D;
  write_rows(dk, LP, L, D, grad_key + grad_at, grad_stride);
  write_rows(dv, LP, L, D, grad_value + grad_at, grad_stride);
}

constexpr int64_t kShort = 64;         // rows of a short segment
constexpr int64_t kTasksPerChunk = 8;  // of MOSI's shape about 20 us

// Calls run(task) for every (segment, head) that has rows: one by one and the longest first, so
// that threads end together, or in chunks if all are short.
template <class Op, class Run>
void for_each_task(int threads, const AttentionShape& shape, Blocking blocking, Run run) {
  const bool is_short = shape.max_len <= kShort;
  const bool is_ordered = !is_short && threads > 1;
  const Array<int32_t> order(is_ordered ? shape.segments : 0);
  if (is_ordered) longest_first(shape.offsets, shape.segments, order.data);
  parallel_for(threads, shape.segments * shape.heads, is_short ? kTasksPerChunk : 1,
               [&](int64_t begin, int64_t end) {
                 [[maybe_unused]] const ProductScope<Op> scope;
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t at = i / shape.heads;
                   const Task task(shape, is_ordered ? order.data[at] : at, i % shape.heads,
                                   blocking);
                   if (task.length > 0) run(task);
                 }
               });
}

}  // namespace

void attention_fwd(int threads, AttentionShape shape, const void* query, const void* key,
                   const void* value, void* out, float* lse, Dropout drop) {
  with_type(shape.dtype, [&]<class T>(T*) {
    using Op = OpOf<T>;
    for_each_task<Op>(threads, shape, kForward<Op>, [&](const Task& task) {
      fwd_task<Op>(shape, task, static_cast<const T*>(query), static_cast<const T*>(key),
                   static_cast<const T*>(value), static_cast<T*>(out), lse, drop);
    });
  });
}

void attention_bwd(int threads, AttentionShape shape, const void* grad_out, const void* query,
                   const void* key, const void* value, const float* lse, void* grad_query,
                   void* grad_key, void* grad_value, int64_t grad_stride, Dropout drop) {
  with_type(shape.dtype, [&]<class T>(T*) {
    using Op = OpOf<T>;
    for_each_task<Op>(threads, shape, kBackward<Op>, [&](const Task& task) {
      bwd_task<Op>(shape, task, static_cast<const T*>(grad_out), static_cast<const T*>(query),
                   static_cast<const T*>(key), static_cast<const T*>(value), lse,
                   static_cast<T*>(grad_query), static_cast<T*>(grad_key),
                   static_cast<T*>(grad_value), grad_stride, drop);
    });
  });
}

}  // namespace uml::UML_ARCH
