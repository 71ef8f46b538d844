// Counter-based random numbers: every value is a function of its coordinates, never of a
// generator's state.
#pragma once

#include <cstdint>

namespace uml {

inline constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// Finaliser of splitmix64: a bijection of 64 bits.
constexpr uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// One coordinate folded into a hash.
constexpr uint64_t fold64(uint64_t h, uint64_t x) { return mix64(h + kGolden * (x + 1)); }

// Sort key of sample `i` in epoch `epoch` of a stream; the same as uml_fast.packing.schedule.hash64.
constexpr uint64_t hash64(uint64_t seed, uint64_t stream, uint64_t epoch, uint64_t i) {
  return fold64(fold64(fold64(fold64(0, seed), stream), epoch), i);
}

}  // namespace uml
