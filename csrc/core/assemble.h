// From a plan to a pack: copies raw rows into a slot and writes the arrays that describe them.
// uml_fast/packing/pack.py (PackedBatch, pack_samples) is the readable definition.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/planner.h"

namespace uml {

// All samples of one modality; the memory must outlive whoever holds this.
struct SourceSpec {
  const std::byte* rows = nullptr;  // offsets.back() rows of row_bytes each; null: produced later
  size_t row_bytes = 0;
  std::span<const int64_t> offsets;  // n + 1
  std::span<const int32_t> labels;   // n
};

// A byte range of a slot.
struct Field {
  size_t offset = 0;
  size_t bytes = 0;
};

// Where the arrays of a layout lie in a slot, each aligned to 64 bytes.
struct SlotMap {
  std::vector<Field> raw;  // per region
  Field offsets, modality, label, sample, position, segment;
  size_t bytes = 0;
};

SlotMap make_slot_map(const LayoutRule& layout, std::span<const SourceSpec> sources);

// Writes one region of the pack of `plan` to `slot`: every byte of its part of every field, but the
// rows of samples of a source that is produced. Regions are written in order; allocates nothing.
void assemble(const LayoutRule& layout, const SlotMap& map, std::span<const SourceSpec> sources,
              const PackPlan& plan, int region, std::byte* slot);

// Turns the sample at place `at` of region `region` into padding: zero rows, no label, no sample.
void reject(const LayoutRule& layout, const SlotMap& map, std::span<const SourceSpec> sources,
            const PackPlan& plan, int region, int64_t at, std::byte* slot);

}  // namespace uml
