// Where the time of packs goes: totals always, single events where a trace is asked for.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace uml {

// What happens to a slot. A slot is the consumer's while it is held.
enum class Phase : int16_t { kFree, kPlan, kDrain, kAssemble, kProduce, kUpload, kReady, kHeld };
inline constexpr size_t kPhases = 8;

// Nanoseconds of the monotonic clock (the one of Python's time.perf_counter_ns).
int64_t now_ns();

// A stretch of a pack's way; `stream` is -1 where it is about all of them.
struct TraceEvent {
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  int64_t pack = 0;
  int32_t slot = 0;
  int16_t phase = 0;
  int16_t stream = -1;
};

// Totals since the start, in nanoseconds.
struct Totals {
  std::array<int64_t, kPhases> phase{};  // over all slots
  std::array<int64_t, kPhases> stall{};  // the consumer waited for a slot in this phase
  std::vector<int64_t> assemble;         // per stream
  std::vector<int64_t> produce_stall;    // per stream: its part of stall[kProduce]
};

// Not thread-safe: its loader calls it under the loader's mutex.
class Timeline {
 public:
  Timeline(int slots, int streams);

  Phase phase(int slot) const { return slots_[slot].phase; }
  int64_t since(int slot) const { return slots_[slot].since; }
  // Ends the slot's phase and begins the next. `stream` is what a slot in kProduce was waiting for.
  void enter(int slot, Phase phase, int64_t pack, int stream = -1);
  // Part of the slot's kAssemble that went to one stream.
  void add_assemble(int slot, int stream, int64_t begin);

  // The consumer waits for `slot` from now on, until stop_wait.
  void start_wait(int slot);
  void stop_wait(int stream);

  // The totals with the phases under way.
  Totals totals() const;

  // From now on the last `capacity` events are kept; allocates, events do not.
  void trace(size_t capacity);
  // The events kept, in the order they ended.
  std::vector<TraceEvent> events() const;

 private:
  struct Slot {
    Phase phase = Phase::kFree;
    int64_t since = 0;
    int64_t pack = 0;
  };

  void charge_stall(int64_t now, int stream);
  void keep(const TraceEvent& event);

  std::vector<Slot> slots_;
  Totals totals_;
  int awaited_ = -1;  // the slot that the consumer waits for
  int64_t awaited_since_ = 0;
  std::vector<TraceEvent> ring_;  // empty: no trace
  size_t kept_ = 0;               // events so far; event i lies at i % ring_.size()
};

}  // namespace uml
