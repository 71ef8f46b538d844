#include "core/loader.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

namespace uml {

SlotMemory::SlotMemory(std::shared_ptr<Device> device, int slots, size_t bytes)
    : device_(std::move(device)) {
  try {
    for (int i = 0; i < slots; ++i) {
      blocks_.push_back(device_->allocate(bytes));
      uploaded_.push_back(device_->make_event());
      released_.push_back(device_->make_event());
    }
  } catch (...) {
    clear();
    throw;
  }
}

void SlotMemory::clear() noexcept {
  try {
    for (Event event : uploaded_) device_->synchronize(event);
    for (Event event : released_) device_->synchronize(event);
  } catch (...) {  // a broken device has nothing in flight that could still read the memory
  }
  for (Event event : uploaded_) device_->free_event(event);
  for (Event event : released_) device_->free_event(event);
  for (const Block& block : blocks_) device_->free(block);
}

Loader::Loader(PlannerSpec spec, std::vector<SourceSpec> sources, std::shared_ptr<Device> device,
               int slots, int threads)
    : planner_(std::move(spec)), sources_(std::move(sources)), threads_(threads) {
  const PlannerSpec& rules = planner_.spec();
  if (slots < 1 || threads < 1) throw std::invalid_argument("a loader needs a slot and a thread");
  if (sources_.size() != rules.streams.size()) {
    throw std::invalid_argument("a loader needs one source per stream");
  }
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (sources_[i].offsets.size() != rules.streams[i].offsets.size() ||
        sources_[i].labels.size() + 1 != sources_[i].offsets.size()) {
      throw std::invalid_argument("a source differs from its stream in the number of samples");
    }
  }
  size_t bytes = 0;
  for (const LayoutRule& layout : rules.layouts) {
    maps_.push_back(make_slot_map(layout, sources_));
    bytes = std::max(bytes, maps_.back().bytes);
  }
  memory_ = std::make_shared<SlotMemory>(std::move(device), slots, bytes);
  slots_.resize(slots);
  for (Slot& slot : slots_) {
    slot.state.resize(planner_.state_size());
    for (const LayoutRule& layout : rules.layouts) {
      slot.plan.regions.resize(std::max(slot.plan.regions.size(), layout.regions.size()));
      slot.work.resize(slot.plan.regions.size(), Work::kNone);
      for (size_t m = 0; m < layout.regions.size(); ++m) {
        Picks& picks = slot.plan.regions[m];
        picks.samples.reserve(static_cast<size_t>(layout.regions[m].slots));
        picks.epochs.reserve(static_cast<size_t>(layout.regions[m].slots));
      }
    }
  }
}

void Loader::start() {
  if (!workers_.empty()) return;
  for (int i = 0; i < threads_; ++i) workers_.emplace_back([this] { work(); });
}

void Loader::stop() {
  std::vector<std::thread> workers;
  {
    std::lock_guard lock(mutex_);
    is_stopping_ = true;
    workers.swap(workers_);
  }
  changed_.notify_all();
  for (std::thread& worker : workers) worker.join();
}

void Loader::close() {
  {
    std::lock_guard lock(mutex_);
    is_closed_ = true;
  }
  stop();
}

void Loader::load(std::span<const int64_t> state, std::vector<Deal> deals) {
  stop();
  std::unique_lock lock(mutex_);
  ++generation_;
  changed_.wait(lock, [this] { return taken_ == 0; });
  for (Slot& slot : slots_) {
    slot.phase = Phase::kFree;
    std::fill(slot.work.begin(), slot.work.end(), Work::kNone);
  }
  claimed_ = acquired_ = 0;
  is_stopping_ = is_planning_ = false;
  error_ = nullptr;
  planner_.load(state, std::move(deals));
}

void Loader::save(std::span<int64_t> state) const {
  if (state.size() != planner_.state_size()) {
    throw std::invalid_argument("the array for the state has the wrong size");
  }
  planner_.save(state);
}

void Loader::enter(int slot, Phase phase) {
  std::lock_guard lock(mutex_);
  slots_[slot].phase = phase;
}

void Loader::make_pack(int index) {
  Slot& slot = slots_[index];
  Device& device = memory_->device();
  const Block& block = memory_->block(index);
  enter(index, Phase::kDrain);
  device.synchronize(memory_->uploaded(index));
  if (block.host == block.device) device.synchronize(memory_->released(index));
  enter(index, Phase::kAssemble);
  const SlotMap& map = maps_[slot.plan.layout];
  const LayoutRule& layout = planner_.spec().layouts[slot.plan.layout];
  assemble(layout, map, sources_, slot.plan, block.host);
  {
    std::lock_guard lock(mutex_);
    bool is_whole = true;
    for (size_t m = 0; m < layout.regions.size(); ++m) {
      if (sources_[layout.regions[m].stream].rows || slot.plan.regions[m].samples.empty()) continue;
      slot.work[m] = Work::kWaiting;
      is_whole = false;
    }
    if (!is_whole) {
      slot.phase = Phase::kProduce;
      return;
    }
  }
  send(index);
}

void Loader::send(int index) {
  Device& device = memory_->device();
  const Block& block = memory_->block(index);
  const SlotMap& map = maps_[slots_[index].plan.layout];
  enter(index, Phase::kUpload);
  device.wait(memory_->released(index), device.copy_stream());
  device.upload(block, map.bytes);
  device.record(memory_->uploaded(index), device.copy_stream());
  enter(index, Phase::kReady);
}

void Loader::work() {
  try {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] {
        return is_stopping_ ||
               (!is_planning_ && slots_[claimed_ % slots_.size()].phase == Phase::kFree);
      });
      if (is_stopping_) return;
      const int slot = static_cast<int>(claimed_++ % slots_.size());
      slots_[slot].phase = Phase::kPlan;
      is_planning_ = true;
      lock.unlock();
      planner_.next(slots_[slot].plan);
      planner_.save(slots_[slot].state);
      lock.lock();
      is_planning_ = false;
      lock.unlock();
      changed_.notify_all();
      make_pack(slot);
      changed_.notify_all();
    }
  } catch (...) {
    set_error(std::current_exception());
  }
}

void Loader::set_error(std::exception_ptr error) {
  {
    std::lock_guard lock(mutex_);
    if (!error_) error_ = std::move(error);
    is_stopping_ = true;
  }
  changed_.notify_all();
}

void Loader::fail(const std::string& what) {
  set_error(std::make_exception_ptr(std::runtime_error(what)));
}

std::optional<Job> Loader::take(int stream, double wait_s) {
  std::unique_lock lock(mutex_);
  Job job;
  const auto find = [&] {
    for (uint64_t i = acquired_; i < claimed_ && !is_stopping_; ++i) {
      job.slot = static_cast<int>(i % slots_.size());
      const Slot& slot = slots_[job.slot];
      if (slot.phase != Phase::kProduce) continue;
      const auto& regions = planner_.spec().layouts[slot.plan.layout].regions;
      for (size_t m = 0; m < regions.size(); ++m) {
        if (regions[m].stream != stream || slot.work[m] != Work::kWaiting) continue;
        job.region = static_cast<int>(m);
        return true;
      }
    }
    return false;
  };
  bool is_found = false;
  changed_.wait_for(lock, std::chrono::duration<double>(wait_s), [&] {
    is_found = find();
    return is_found || is_closed_ || error_;
  });
  if (!is_found) return std::nullopt;
  Slot& slot = slots_[job.slot];
  slot.work[job.region] = Work::kTaken;
  ++taken_;
  job.generation = generation_;
  job.samples = slot.plan.regions[job.region].samples;
  job.epochs = slot.plan.regions[job.region].epochs;
  job.rows = memory_->block(job.slot).host + maps_[slot.plan.layout].raw[job.region].offset;
  return job;
}

void Loader::finish(const Job& job, std::span<const int64_t> rejected) {
  Slot& slot = slots_[job.slot];
  bool is_whole = false;
  {
    std::lock_guard lock(mutex_);
    if (job.generation == generation_ && !is_stopping_) {
      const LayoutRule& layout = planner_.spec().layouts[slot.plan.layout];
      for (const int64_t at : rejected) {
        reject(layout, maps_[slot.plan.layout], sources_, slot.plan, job.region, at,
               memory_->block(job.slot).host);
      }
      slot.work[job.region] = Work::kNone;
      is_whole = std::all_of(slot.work.begin(), slot.work.end(),
                             [](Work work) { return work == Work::kNone; });
      if (is_whole) slot.phase = Phase::kUpload;
    }
  }
  if (is_whole) {
    try {
      send(job.slot);
    } catch (...) {
      set_error(std::current_exception());
    }
  }
  {
    std::lock_guard lock(mutex_);
    --taken_;
  }
  changed_.notify_all();
}

std::optional<int> Loader::acquire(double wait_s, Stream stream) {
  std::unique_lock lock(mutex_);
  if (is_closed_) throw std::runtime_error("the loader is closed");
  if (!error_) start();
  const int slot = static_cast<int>(acquired_ % slots_.size());
  const bool is_there = changed_.wait_for(
      lock, std::chrono::duration<double>(wait_s),
      [this, slot] { return error_ || is_closed_ || slots_[slot].phase == Phase::kReady; });
  if (error_) std::rethrow_exception(error_);
  if (is_closed_) throw std::runtime_error("the loader was closed while a pack was awaited");
  if (!is_there) return std::nullopt;
  slots_[slot].phase = Phase::kHeld;
  ++acquired_;
  lock.unlock();
  memory_->device().wait(memory_->uploaded(slot), stream);
  return slot;
}

void Loader::release(int slot, Stream stream) {
  if (slot < 0 || slot >= static_cast<int>(slots_.size())) {
    throw std::invalid_argument("there is no such slot");
  }
  memory_->device().record(memory_->released(slot), stream);
  {
    std::lock_guard lock(mutex_);
    if (slots_[slot].phase != Phase::kHeld) {
      throw std::invalid_argument("the slot is not held, so it cannot be released");
    }
    slots_[slot].phase = Phase::kFree;
  }
  changed_.notify_all();
}

int Loader::ready() const {
  std::lock_guard lock(mutex_);
  return static_cast<int>(std::count_if(
      slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.phase == Phase::kReady; }));
}

std::string Loader::stage() const {
  std::lock_guard lock(mutex_);
  const size_t slot = acquired_ % slots_.size();
  const std::string where = " (slot " + std::to_string(slot) + ")";
  switch (slots_[slot].phase) {
    case Phase::kFree:
      return "wait for a worker" + where;
    case Phase::kPlan:
      return "plan" + where;
    case Phase::kDrain:
      return "wait for the device to free the slot" + where;
    case Phase::kAssemble:
      return "assemble" + where;
    case Phase::kProduce: {
      const auto& regions = planner_.spec().layouts[slots_[slot].plan.layout].regions;
      for (size_t m = 0; m < regions.size(); ++m) {
        const Work work = slots_[slot].work[m];
        if (work == Work::kNone) continue;
        return (work == Work::kTaken ? "decode stream " : "wait for a producer of stream ") +
               std::to_string(regions[m].stream) + where;
      }
      return "decode" + where;
    }
    case Phase::kUpload:
      return "upload" + where;
    case Phase::kReady:
      return "ready" + where;
    case Phase::kHeld:
      return "all slots are held by the consumer; release one first" + where;
  }
  return "unknown" + where;
}

}  // namespace uml
