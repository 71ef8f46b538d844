// Ragged samples for the C++ tests: row r of sample i holds the value i in every byte.
#pragma once

#include <cstdint>
#include <vector>

#include "core/assemble.h"
#include "core/planner.h"
#include "core/rng.h"

namespace uml {

struct RaggedData {
  std::vector<int64_t> offsets{0};
  std::vector<int32_t> labels;
  std::vector<std::byte> rows;
  size_t row_bytes;

  RaggedData(int samples, int64_t shortest, int64_t longest, size_t bytes) : row_bytes(bytes) {
    for (int i = 0; i < samples; ++i) {
      const uint64_t h = hash64(7, row_bytes, 0, static_cast<uint64_t>(i));
      const int64_t n = shortest + static_cast<int64_t>(h % (longest - shortest + 1));
      offsets.push_back(offsets.back() + n);
      labels.push_back(i % 3);
      rows.insert(rows.end(), static_cast<size_t>(n) * row_bytes, static_cast<std::byte>(i));
    }
  }
  SourceSpec source() const { return {rows.data(), row_bytes, offsets, labels}; }
  StreamSpec stream(double share) const { return {row_bytes, offsets, share}; }
};

// A joint layout of two streams with `rows` rows for each.
inline PlannerSpec joint_spec(const RaggedData& a, const RaggedData& b, int64_t rows,
                              int64_t max_len) {
  PlannerSpec spec;
  spec.streams = {a.stream(1.0), b.stream(1.0)};
  LayoutRule layout;
  for (int stream = 0; stream < 2; ++stream) {
    layout.regions.push_back({stream, rows, rows, max_len, 2 * max_len, rows / 128});
  }
  layout.order = {0, 1};
  layout.pace = static_cast<double>(rows) / 1.01;
  spec.layouts = {layout};
  spec.seed = 3;
  return spec;
}

}  // namespace uml
