#include "core/assemble.h"

#include <algorithm>
#include <cstring>

namespace uml {
namespace {

constexpr size_t kAlign = 64;
constexpr int32_t kPadding = -1;

}  // namespace

SlotMap make_slot_map(const LayoutRule& layout, std::span<const SourceSpec> sources) {
  SlotMap map;
  const auto place = [&map](size_t bytes) {
    const Field field{map.bytes, bytes};
    map.bytes += (bytes + kAlign - 1) / kAlign * kAlign;
    return field;
  };
  size_t rows = 0;
  size_t slots = 0;
  for (const RegionRule& r : layout.regions) {
    map.raw.push_back(place(static_cast<size_t>(r.rows) * sources[r.stream].row_bytes));
    rows += static_cast<size_t>(r.rows);
    slots += static_cast<size_t>(r.slots);
  }
  map.offsets = place((slots + 1) * sizeof(int32_t));
  map.modality = place(slots * sizeof(int32_t));
  map.label = place(slots * sizeof(int32_t));
  map.sample = place(slots * sizeof(int64_t));
  map.position = place(rows * sizeof(int32_t));
  map.segment = place(rows * sizeof(int32_t));
  return map;
}

void assemble(const LayoutRule& layout, const SlotMap& map, std::span<const SourceSpec> sources,
              const PackPlan& plan, int region, std::byte* slot) {
  auto* offsets = reinterpret_cast<int32_t*>(slot + map.offsets.offset);
  auto* modality = reinterpret_cast<int32_t*>(slot + map.modality.offset);
  auto* label = reinterpret_cast<int32_t*>(slot + map.label.offset);
  auto* sample = reinterpret_cast<int64_t*>(slot + map.sample.offset);
  auto* position = reinterpret_cast<int32_t*>(slot + map.position.offset);
  auto* segment = reinterpret_cast<int32_t*>(slot + map.segment.offset);

  int64_t row = 0;
  int64_t s = 0;
  for (int m = 0; m < region; ++m) {
    row += layout.regions[m].rows;
    s += layout.regions[m].slots;
  }
  const auto add_segment = [&](int64_t rows, int32_t m, int32_t y, int64_t i) {
    offsets[s] = static_cast<int32_t>(row);
    modality[s] = m;
    label[s] = y;
    sample[s] = i;
    for (int64_t k = 0; k < rows; ++k) position[row + k] = static_cast<int32_t>(k);
    std::fill_n(segment + row, rows, static_cast<int32_t>(s));
    row += rows;
    ++s;
  };

  const RegionRule& r = layout.regions[region];
  const SourceSpec& source = sources[r.stream];
  const int64_t end_row = row + r.rows;
  const int64_t end_slot = s + r.slots;
  std::byte* raw = slot + map.raw[region].offset;
  for (const int64_t i : plan.regions[region].samples) {
    const int64_t rows = source.offsets[i + 1] - source.offsets[i];
    const size_t bytes = static_cast<size_t>(rows) * source.row_bytes;
    if (source.rows) {
      std::memcpy(raw, source.rows + static_cast<size_t>(source.offsets[i]) * source.row_bytes,
                  bytes);
    }
    raw += bytes;
    add_segment(rows, region, source.labels[i], i);
  }
  std::memset(raw, 0, static_cast<size_t>(end_row - row) * source.row_bytes);
  while (row < end_row) add_segment(std::min(r.max_len, end_row - row), kPadding, -1, -1);
  while (s < end_slot) add_segment(0, kPadding, -1, -1);
  offsets[s] = static_cast<int32_t>(row);
}

void reject(const LayoutRule& layout, const SlotMap& map, std::span<const SourceSpec> sources,
            const PackPlan& plan, int region, int64_t at, std::byte* slot) {
  const RegionRule& r = layout.regions[region];
  const SourceSpec& source = sources[r.stream];
  int64_t s = at;
  for (int m = 0; m < region; ++m) s += layout.regions[m].slots;
  int64_t first = 0;
  for (int64_t i = 0; i < at; ++i) {
    const int64_t sample = plan.regions[region].samples[i];
    first += source.offsets[sample + 1] - source.offsets[sample];
  }
  const int64_t sample = plan.regions[region].samples[at];
  const int64_t rows = source.offsets[sample + 1] - source.offsets[sample];
  std::memset(slot + map.raw[region].offset + static_cast<size_t>(first) * source.row_bytes, 0,
              static_cast<size_t>(rows) * source.row_bytes);
  reinterpret_cast<int32_t*>(slot + map.modality.offset)[s] = kPadding;
  reinterpret_cast<int32_t*>(slot + map.label.offset)[s] = -1;
  reinterpret_cast<int64_t*>(slot + map.sample.offset)[s] = -1;
}

}  // namespace uml
