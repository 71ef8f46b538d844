#include "core/timeline.h"

#include <algorithm>
#include <chrono>

namespace uml {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Timeline::Timeline(int slots, int streams) : slots_(slots, Slot{Phase::kFree, now_ns(), 0}) {
  totals_.assemble.resize(streams);
  totals_.produce_stall.resize(streams);
}

void Timeline::enter(int index, Phase phase, int64_t pack, int stream) {
  Slot& slot = slots_[index];
  const int64_t now = now_ns();
  if (index == awaited_) charge_stall(now, stream);
  totals_.phase[static_cast<size_t>(slot.phase)] += now - slot.since;
  if (slot.phase != Phase::kFree) {
    keep({slot.since, now, slot.pack, index, static_cast<int16_t>(slot.phase), -1});
  }
  slot = {phase, now, pack};
}

void Timeline::add_assemble(int slot, int stream, int64_t begin) {
  const int64_t now = now_ns();
  totals_.assemble[stream] += now - begin;
  keep({begin, now, slots_[slot].pack, slot, static_cast<int16_t>(Phase::kAssemble),
        static_cast<int16_t>(stream)});
}

void Timeline::start_wait(int slot) {
  awaited_ = slot;
  awaited_since_ = now_ns();
}

void Timeline::stop_wait(int stream) {
  charge_stall(now_ns(), stream);
  awaited_ = -1;
}

void Timeline::charge_stall(int64_t now, int stream) {
  const Phase phase = slots_[awaited_].phase;
  const int64_t waited = now - awaited_since_;
  awaited_since_ = now;
  totals_.stall[static_cast<size_t>(phase)] += waited;
  if (phase == Phase::kProduce && stream >= 0) totals_.produce_stall[stream] += waited;
}

Totals Timeline::totals() const {
  Totals out = totals_;
  const int64_t now = now_ns();
  for (const Slot& slot : slots_) out.phase[static_cast<size_t>(slot.phase)] += now - slot.since;
  return out;
}

void Timeline::trace(size_t capacity) {
  ring_.resize(capacity);
  kept_ = 0;
}

void Timeline::keep(const TraceEvent& event) {
  if (!ring_.empty()) ring_[kept_++ % ring_.size()] = event;
}

std::vector<TraceEvent> Timeline::events() const {
  std::vector<TraceEvent> out;
  const size_t count = std::min(kept_, ring_.size());
  for (size_t i = kept_ - count; i < kept_; ++i) out.push_back(ring_[i % ring_.size()]);
  return out;
}

}  // namespace uml
