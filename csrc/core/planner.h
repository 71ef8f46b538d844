// Which samples go into which pack. uml_fast/packing/schedule.py is the readable definition and gives the
// same plans.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace uml {

inline constexpr int kWindow = 64;

// What the planner knows of one modality. `offsets` has n + 1 entries and must outlive the planner.
struct StreamSpec {
  uint64_t key = 0;
  std::span<const int64_t> offsets;
  double share = 1.0;
};

// How one region is filled; fields as in uml_fast.packing.schedule.RegionRule.
struct RegionRule {
  int stream = 0;
  int64_t rows = 0;
  int64_t slots = 0;
  int64_t max_len = 0;
  int64_t reserve = 0;
  int64_t close = 0;
};

// How one layout is filled; fields as in uml_fast.packing.layout.LayoutRule.
struct LayoutRule {
  std::vector<RegionRule> regions;
  std::vector<int> order;
  double pace = 0.0;
};

enum class Policy { kJoint, kAlternate, kWarmup };

// Everything the planner needs beside the streams; fields as in uml_fast.packing.layout.Rules.
struct PlannerSpec {
  std::vector<StreamSpec> streams;
  std::vector<LayoutRule> layouts;
  Policy policy = Policy::kJoint;
  std::vector<int> first_side;
  double warmup_epochs = 0.0;
  uint64_t seed = 0;
  int rank = 0;
  int world = 1;
};

// The samples of one region in packed order, and the epoch that each is taken from.
struct Picks {
  std::vector<int64_t> samples;
  std::vector<int64_t> epochs;
  bool operator==(const Picks&) const = default;
};

// The samples of one pack. `regions` keeps its capacity from pack to pack.
struct PackPlan {
  int layout = 0;
  std::vector<Picks> regions;
};

// What a rank still gets of the epochs that had begun when the number of ranks changed; fields as
// in uml_fast.packing.schedule.Deal.
struct Deal {
  int64_t through = -1;
  std::vector<int64_t> epochs;
  std::vector<int64_t> samples;
};

// The samples of one stream to come: a window of the next 64 in the order of their epochs.
class StreamQueue {
 public:
  StreamQueue(const StreamSpec& spec, uint64_t seed, int rank, int world);

  // Appends to `picks` the samples whose rows come nearest to `target`.
  void fill(int64_t target, const RegionRule& rule, Picks& picks);

  int64_t size() const { return static_cast<int64_t>(spec_.offsets.size()) - 1; }
  double progress() const { return static_cast<double>(phase_rows_) / spec_.share; }
  double share() const { return spec_.share; }
  int64_t phase_rows() const { return phase_rows_; }
  int64_t samples() const { return samples_; }
  void start_phase() { phase_rows_ = 0; }

  static constexpr int kStateSize = 8 + 2 * kWindow;
  void save(std::span<int64_t> state) const;
  void load(std::span<const int64_t> state, Deal deal);

 private:
  struct Entry {
    int64_t epoch;
    int64_t sample;
    int64_t length;
  };
  struct Group {
    int count = 0;
    std::array<int, 2> position{};
  };

  // First place of this rank in the order of an epoch.
  int64_t first(int64_t epoch) const;
  void seek(int64_t epoch, int64_t cursor);
  void refill();
  void take(int position, Picks& picks);
  Group best_group(int64_t rem, int64_t room, int64_t count, const RegionRule& rule) const;
  int64_t length(int64_t sample) const { return spec_.offsets[sample + 1] - spec_.offsets[sample]; }

  StreamSpec spec_;
  uint64_t seed_;
  int rank_;
  int world_;
  int64_t epoch_ = 0;
  int64_t cursor_ = 0;
  int64_t phase_rows_ = 0;
  int64_t samples_ = 0;
  int64_t rows_ = 0;
  Deal deal_;                     // empty once an epoch behind it has begun
  std::vector<int64_t> order_;    // samples of this rank in the order of epoch_, or of deal_
  std::vector<uint64_t> hashes_;  // scratch of seek
  std::vector<int64_t> sorted_;   // scratch of seek
  std::array<Entry, kWindow> window_{};
  int held_ = 0;
};

// Plans pack after pack, for ever. Not thread-safe: the loader serialises it.
class Planner {
 public:
  // Throws std::invalid_argument for rules that name a stream that does not exist.
  explicit Planner(PlannerSpec spec);

  // Writes the next pack's plan; allocates nothing once `plan` has grown to its largest size.
  void next(PackPlan& plan);

  // The state as integers, the same as uml_fast.packing.schedule.Planner's.
  size_t state_size() const { return kHeader + queues_.size() * StreamQueue::kStateSize; }
  void save(std::span<int64_t> state) const;
  // `deals` has what each stream was dealt, or is empty. Throws std::invalid_argument for a state
  // of another shape or with samples that do not exist.
  void load(std::span<const int64_t> state, std::vector<Deal> deals);

  const PlannerSpec& spec() const { return spec_; }

 private:
  static constexpr int64_t kFormat = 2;
  static constexpr size_t kHeader = 7;

  int layout_index() const;
  bool first_side_done() const;

  PlannerSpec spec_;
  std::vector<StreamQueue> queues_;
  int64_t packs_ = 0;
  bool is_warm_ = false;
};

}  // namespace uml
