// Softmax of scores whose queries are lanes: a panel holds the scores of kWidth queries, one row
// per key, so maxima and sums need no exchange between lanes.
//
// Rows are taken in pairs of keys: two keys share a word of a bf16 operand and a hash of the
// dropout mask.
#pragma once

#include <type_traits>

#include "attention_operands.h"

namespace uml::UML_ARCH {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// Which keys the queries of a panel see.
struct Seen {
  VecI last;       // of each query
  int64_t common;  // keys that all of them see, rounded down to even
  int64_t keys;    // keys that any of them sees

  // Queries from `query` on of a segment of `length` keys.
  UML_INLINE Seen(bool is_causal, int64_t query, int64_t length) {
    keys = is_causal ? smaller(length, query + kWidth) : length;
    common = (is_causal ? smaller(length, query + 1) : length) / 2 * 2;
    const VecI end = VecI{} + static_cast<int32_t>(length - 1);
    const VecI self = iota() + static_cast<int32_t>(query);
    last = is_causal ? (self < end ? self : end) : end;
  }
  UML_INLINE VecI sees(int64_t key) const { return last >= static_cast<int32_t>(key); }
};

// Keep factors (0 or scale) for kWidth rows of a dropout mask (see RowMask) that are `step` apart.
struct PanelMask {
  VecU first;
  VecU key_high;
  uint32_t key_low;
  uint32_t threshold;
  float scale;

  UML_INLINE PanelMask(const Dropout& d, int64_t row, int64_t step, int64_t cols) {
    uint32_t low[kWidth], high[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const RowMask mask(d, row + i * step, cols);
      low[i] = mask.first;
      high[i] = mask.key_high;
    }
    std::memcpy(&first, low, sizeof low);
    std::memcpy(&key_high, high, sizeof high);
    key_low = static_cast<uint32_t>(d.key);
    threshold = d.threshold;
    scale = d.scale;
  }

  // Whether keys `key`, which is even, and key + 1 are kept.
  UML_INLINE void kept(int64_t key, VecI& even, VecI& odd) const {
    const VecU x = mask_hash(first + static_cast<uint32_t>(key / 2), key_low, key_high);
    even = (VecI)(x & 0xFFFF) >= static_cast<int32_t>(threshold);
    odd = (VecI)(x >> 16) >= static_cast<int32_t>(threshold);
  }
};

// Calls use(key, sees0, sees1, is_masked) for pairs of keys; sees0 and sees1 matter if is_masked.
template <class Use>
UML_INLINE void for_each_pair(const Seen& seen, Use use) {
  int64_t j = 0;
  for (; j < seen.common; j += 2) use(j, VecI{}, VecI{}, std::false_type());
  for (; j < seen.keys; j += 2) use(j, seen.sees(j), seen.sees(j + 1), std::true_type());
}

// Where a panel's probabilities go in the forward pass.
template <class Op>
struct Probabilities;

template <>
struct Probabilities<Singles> {
  float* b;  // B operand with keys summed
  UML_INLINE void put(int64_t key, Vec p0, Vec p1) const {
    store(b + key * kWidth, p0);
    store(b + (key + 1) * kWidth, p1);
  }
  // Zeros for keys [begin, end).
  UML_INLINE void clear(int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; ++j) store(b + j * kWidth, Vec{});
  }
};

// Where a panel's probabilities and gradients of scores go in the backward pass.
template <class Op>
struct ScoreGradients;

template <>
struct ScoreGradients<Singles> {
  float* p;   // A operand with queries summed
  float* ds;  // the same, and B operand with keys summed
  UML_INLINE void put(int64_t key, Vec p0, Vec p1, Vec ds0, Vec ds1) const {
    store(p + key * kWidth, p0);
    store(p + (key + 1) * kWidth, p1);
    store(ds + key * kWidth, ds0);
    store(ds + (key + 1) * kWidth, ds1);
  }
  UML_INLINE void clear(int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; ++j) {
      store(p + j * kWidth, Vec{});
      store(ds + j * kWidth, Vec{});
    }
  }
};

#if defined(__AVX512BF16__)
// B operands with keys summed are zero to the end of their panel of words: tiles are whole.
UML_INLINE void clear_pairs(float* b, int64_t begin, int64_t end) {
  for (int64_t w = begin / 2; w < padded_words<Pairs>(end); ++w) store(b + w * kWidth, Vec{});
}

template <>
struct Probabilities<Pairs> {
  float* b;
  UML_INLINE void put(int64_t key, Vec p0, Vec p1) const {
    store(b + key / 2 * kWidth, round_to_pairs(p0, p1));
  }
  UML_INLINE void clear(int64_t begin, int64_t end) const { clear_pairs(b, begin, end); }
};

template <>
struct ScoreGradients<Pairs> {
  bf16* p;      // half of the words of an A panel with queries summed
  bf16* ds;     // the same
  float* ds_b;  // B operand with keys summed
  UML_INLINE void put(int64_t key, Vec p0, Vec p1, Vec ds0, Vec ds1) const {
    store(p + 2 * key * kWidth, p0);
    store(p + 2 * (key + 1) * kWidth, p1);
    store(ds + 2 * key * kWidth, ds0);
    store(ds + 2 * (key + 1) * kWidth, ds1);
    store(ds_b + key / 2 * kWidth, round_to_pairs(ds0, ds1));
  }
  UML_INLINE void clear(int64_t begin, int64_t end) const {
    clear_half(begin, end);
    clear_pairs(ds_b, begin, end);
  }
  UML_INLINE void clear_half(int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; ++j) {
      store(p + 2 * j * kWidth, Vec{});
      store(ds + 2 * j * kWidth, Vec{});
    }
  }
};
#endif

// Statistics of the queries of a panel.
struct SoftmaxSums {
  Vec inverse;  // 1 / sum of the probabilities as written
  Vec lse;      // natural log-sum-exp of the scaled scores
};

// Probabilities, not yet divided by their sum, of the scores of the keys that are seen; zero for
// the others of [0, keys). Dropped ones are zero, the scale of the rest is in `inverse`.
template <class Op, bool kDrop>
UML_INLINE SoftmaxSums softmax_panel(const float* s, float scale, const Seen& seen, int64_t keys,
                                     const PanelMask* mask, Probabilities<Op> out) {
  const float scale2 = scale * kLog2E;
  const Vec lowest = splat(-3.0e38f);
  Vec top0 = lowest, top1 = lowest;
  for_each_pair(seen, [&](int64_t j, VecI sees0, VecI sees1, auto is_masked) {
    Vec a = load(s + j * kWidth) * scale2, b = load(s + (j + 1) * kWidth) * scale2;
    if constexpr (is_masked) {
      a = sees0 ? a : lowest;
      b = sees1 ? b : lowest;
    }
    top0 = vmax(a, top0);
    top1 = vmax(b, top1);
  });
  const Vec top = vmax(top0, top1);
  Vec sum0{}, sum1{};
  for_each_pair(seen, [&](int64_t j, VecI sees0, VecI sees1, auto is_masked) {
    Vec a = exp2(load(s + j * kWidth) * scale2 - top);
    Vec b = exp2(load(s + (j + 1) * kWidth) * scale2 - top);
    if constexpr (is_masked) {
      a = sees0 ? a : Vec{};
      b = sees1 ? b : Vec{};
    }
    sum0 += a;
    sum1 += b;
    if constexpr (kDrop) {
      VecI even, odd;
      mask->kept(j, even, odd);
      a = even ? a : Vec{};
      b = odd ? b : Vec{};
    }
    out.put(j, a, b);
  });
  out.clear(round_up(seen.keys, 2), keys);
  const Vec sum = sum0 + sum1;
  return {(kDrop ? mask->scale : 1.0f) / sum, top * kLn2 + log(sum)};
}

// From scores and from the gradient of probabilities (value grad_out^T), both overwritten:
// probabilities times keep factors (for the gradient of value) and the gradient of the unscaled
// scores, zero for keys of [0, keys) that are not seen. Probabilities are normalised again, since
// the rounding of a large log-sum-exp would cost most of their digits.
template <class Op, bool kDrop>
UML_INLINE void softmax_bwd_panel(float* s, float* grad, float scale, const Seen& seen,
                                  int64_t keys, Vec lse, const PanelMask* mask,
                                  ScoreGradients<Op> out) {
  const float scale2 = scale * kLog2E;
  const Vec lse2 = lse * kLog2E;
  Vec sum0{}, sum1{}, dot0{}, dot1{};
  for_each_pair(seen, [&](int64_t j, VecI sees0, VecI sees1, auto is_masked) {
    float *sj = s + j * kWidth, *gj = grad + j * kWidth;
    Vec a = exp2(load(sj) * scale2 - lse2), b = exp2(load(sj + kWidth) * scale2 - lse2);
    if constexpr (is_masked) {
      a = sees0 ? a : Vec{};
      b = sees1 ? b : Vec{};
    }
    sum0 += a;
    sum1 += b;
    if constexpr (kDrop) {
      // A dropped probability is remembered as negative, its gradient is zero.
      VecI even, odd;
      mask->kept(j, even, odd);
      if constexpr (is_masked) {
        even &= sees0;
        odd &= sees1;
      }
      const Vec ga = even ? load(gj) * mask->scale : Vec{};
      const Vec gb = odd ? load(gj + kWidth) * mask->scale : Vec{};
      store(gj, ga);
      store(gj + kWidth, gb);
      dot0 += a * ga;
      dot1 += b * gb;
      a = even ? a : -a;
      b = odd ? b : -b;
    } else if constexpr (is_masked) {
      // Rows that no query sees hold no numbers.
      const Vec ga = sees0 ? load(gj) : Vec{}, gb = sees1 ? load(gj + kWidth) : Vec{};
      store(gj, ga);
      store(gj + kWidth, gb);
      dot0 += a * ga;
      dot1 += b * gb;
    } else {
      dot0 += a * load(gj);
      dot1 += b * load(gj + kWidth);
    }
    store(sj, a);
    store(sj + kWidth, b);
  });
  const Vec inverse = 1.0f / (sum0 + sum1), delta = (dot0 + dot1) * inverse;
  const Vec factor = inverse * scale;
  const Vec kept = kDrop ? inverse * mask->scale : inverse;
  for (int64_t j = 0; j < seen.keys; j += 2) {
    const float *sj = s + j * kWidth, *gj = grad + j * kWidth;
    const Vec a = load(sj), b = load(sj + kWidth);
    const Vec ga = load(gj) - delta, gb = load(gj + kWidth) - delta;
    if constexpr (kDrop) {
      const Vec zero{};
      out.put(j, vmax(a, zero) * kept, vmax(b, zero) * kept, magnitude(a) * factor * ga,
              magnitude(b) * factor * gb);
    } else {
      out.put(j, a * kept, b * kept, a * factor * ga, b * factor * gb);
    }
  }
  out.clear(round_up(seen.keys, 2), keys);
}

}  // namespace uml::UML_ARCH
