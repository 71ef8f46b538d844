#include "core/loader.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

namespace uml {
Loader::Loader(PlannerSpec spec, std::vector<SourceSpec> sources, std::shared_ptr<Device> device,
               int slots, int threads, int64_t job_bytes)
    : planner_(std::move(spec)),
      sources_(std::move(sources)),
      threads_(threads),
      job_bytes_(job_bytes),
      timeline_(slots, static_cast<int>(sources_.size())) {
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
      slot.work.resize(slot.plan.regions.size());
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

bool Loader::drain(double wait_s) {
  stop();
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(wait_s),
                           [this] { return taken_ == 0; });
}

void Loader::load(std::span<const int64_t> state, std::vector<Deal> deals) {
  if (!drain(0)) throw std::runtime_error("producers still write to slots; drain the loader first");
  std::lock_guard lock(mutex_);
  for (int i = 0; i < static_cast<int>(slots_.size()); ++i) enter(i, Phase::kFree);
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

void Loader::enter(int slot, Phase phase, int stream) {
  timeline_.enter(slot, phase, static_cast<int64_t>(slots_[slot].pack), stream);
}

void Loader::make_pack(int index) {
  Slot& slot = slots_[index];
  Device& device = memory_->device();
  const Block& block = memory_->block(index);
  const auto move = [this, index](Phase phase) {
    std::lock_guard lock(mutex_);
    enter(index, phase);
  };
  move(Phase::kDrain);
  device.synchronize(memory_->uploaded(index));
  if (block.host == block.device) device.synchronize(memory_->released(index));
  move(Phase::kAssemble);
  const SlotMap& map = maps_[slot.plan.layout];
  const LayoutRule& layout = planner_.spec().layouts[slot.plan.layout];
  for (int m = 0; m < static_cast<int>(layout.regions.size()); ++m) {
    const int64_t begin = now_ns();
    assemble(layout, map, sources_, slot.plan, m, block.host);
    std::lock_guard lock(mutex_);
    timeline_.add_assemble(index, layout.regions[m].stream, begin);
  }
  {
    std::lock_guard lock(mutex_);
    bool is_whole = true;
    for (size_t m = 0; m < layout.regions.size(); ++m) {
      const bool is_produced = !sources_[layout.regions[m].stream].rows;
      const auto count = static_cast<int64_t>(slot.plan.regions[m].samples.size());
      slot.work[m] = {0, 0, is_produced ? count : 0};
      is_whole = is_whole && slot.work[m].left == 0;
    }
    enter(index, is_whole ? Phase::kUpload : Phase::kProduce);
    if (!is_whole) return;
  }
  send(index);
}

void Loader::send(int index) {
  Device& device = memory_->device();
  const Block& block = memory_->block(index);
  const SlotMap& map = maps_[slots_[index].plan.layout];
  device.wait(memory_->released(index), device.copy_stream());
  device.upload(block, map.bytes);
  device.record(memory_->uploaded(index), device.copy_stream());
  std::lock_guard lock(mutex_);
  enter(index, Phase::kReady);
}

void Loader::work() {
  try {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] {
        return is_stopping_ ||
               (!is_planning_ &&
                timeline_.phase(static_cast<int>(claimed_ % slots_.size())) == Phase::kFree);
      });
      if (is_stopping_) return;
      const int slot = static_cast<int>(claimed_ % slots_.size());
      slots_[slot].pack = claimed_++;
      enter(slot, Phase::kPlan);
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

bool Loader::cut_job(int index, Job& job) {
  Slot& slot = slots_[index];
  if (timeline_.phase(index) != Phase::kProduce) return false;
  const auto& regions = planner_.spec().layouts[slot.plan.layout].regions;
  for (size_t m = 0; m < regions.size(); ++m) {
    Work& work = slot.work[m];
    const Picks& picks = slot.plan.regions[m];
    const auto count = static_cast<int64_t>(picks.samples.size());
    if (work.left == 0 || work.next == count) continue;
    const SourceSpec& source = sources_[regions[m].stream];
    const auto row_bytes = static_cast<int64_t>(source.row_bytes);
    int64_t rows = 0;
    int64_t end = work.next;
    while (end < count && rows * row_bytes < job_bytes_) {
      const int64_t i = picks.samples[end++];
      rows += source.offsets[i + 1] - source.offsets[i];
    }
    const auto part = static_cast<size_t>(end - work.next);
    const size_t at = maps_[slot.plan.layout].raw[m].offset +
                      static_cast<size_t>(work.next_row) * source.row_bytes;
    job = {static_cast<int64_t>(slot.pack),
           index,
           static_cast<int>(m),
           regions[m].stream,
           work.next,
           std::span(picks.samples).subspan(work.next, part),
           std::span(picks.epochs).subspan(work.next, part),
           memory_->block(index).host + at,
           static_cast<size_t>(rows) * source.row_bytes};
    work.next = end;
    work.next_row += rows;
    return true;
  }
  return false;
}

std::optional<Job> Loader::take(double wait_s) {
  std::unique_lock lock(mutex_);
  Job job;
  bool is_found = false;
  changed_.wait_for(lock, std::chrono::duration<double>(wait_s), [&] {
    for (uint64_t i = acquired_; i < claimed_ && !is_stopping_ && !is_found; ++i) {
      is_found = cut_job(static_cast<int>(i % slots_.size()), job);
    }
    return is_found || is_closed_;
  });
  if (!is_found) return std::nullopt;
  ++taken_;
  return job;
}

void Loader::finish(const Job& job, std::span<const int64_t> rejected) {
  Slot& slot = slots_[job.slot];
  bool is_whole = false;
  {
    std::lock_guard lock(mutex_);
    if (!is_stopping_) {
      for (const int64_t at : rejected) {
        reject(planner_.spec().layouts[slot.plan.layout], maps_[slot.plan.layout], sources_,
               slot.plan, job.region, job.first + at, memory_->block(job.slot).host);
      }
      slot.work[job.region].left -= static_cast<int64_t>(job.samples.size());
      is_whole = late_stream(job.slot) < 0;
      if (is_whole) enter(job.slot, Phase::kUpload, job.stream);
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

int Loader::late_stream(int index) const {
  const Slot& slot = slots_[index];
  const auto& regions = planner_.spec().layouts[slot.plan.layout].regions;
  for (size_t m = 0; m < regions.size(); ++m) {
    if (slot.work[m].left > 0) return regions[m].stream;
  }
  return -1;
}

std::optional<int> Loader::acquire(double wait_s, Stream stream) {
  std::unique_lock lock(mutex_);
  if (is_closed_) throw std::runtime_error("the loader is closed");
  if (!error_) start();
  const int slot = static_cast<int>(acquired_ % slots_.size());
  const auto is_there = [this, slot] { return timeline_.phase(slot) == Phase::kReady; };
  if (!is_there()) {
    timeline_.start_wait(slot);
    changed_.wait_for(lock, std::chrono::duration<double>(wait_s),
                      [&] { return error_ || is_closed_ || is_there(); });
    timeline_.stop_wait(timeline_.phase(slot) == Phase::kProduce ? late_stream(slot) : -1);
  }
  if (error_) std::rethrow_exception(error_);
  if (is_closed_) throw std::runtime_error("the loader was closed while a pack was awaited");
  if (!is_there()) return std::nullopt;
  lock.unlock();
  memory_->device().wait(memory_->uploaded(slot), stream);  // if it throws, the pack is not lost
  lock.lock();
  enter(slot, Phase::kHeld);
  ++acquired_;
  return slot;
}

void Loader::release(int slot, Stream stream) {
  if (slot < 0 || slot >= static_cast<int>(slots_.size())) {
    throw std::invalid_argument("there is no such slot");
  }
  memory_->device().record(memory_->released(slot), stream);
  {
    std::lock_guard lock(mutex_);
    if (timeline_.phase(slot) != Phase::kHeld) {
      throw std::invalid_argument("the slot is not held, so it cannot be released");
    }
    enter(slot, Phase::kFree);
  }
  changed_.notify_all();
}

int Loader::ready() const {
  std::lock_guard lock(mutex_);
  int count = 0;
  for (int i = 0; i < static_cast<int>(slots_.size()); ++i) {
    count += timeline_.phase(i) == Phase::kReady;
  }
  return count;
}

Totals Loader::totals() const {
  std::lock_guard lock(mutex_);
  return timeline_.totals();
}

void Loader::trace(size_t capacity) {
  std::lock_guard lock(mutex_);
  timeline_.trace(capacity);
}

std::vector<TraceEvent> Loader::events() const {
  std::lock_guard lock(mutex_);
  return timeline_.events();
}

std::string Loader::stage() const {
  std::lock_guard lock(mutex_);
  const int slot = static_cast<int>(acquired_ % slots_.size());
  const std::string where =
      " (pack " + std::to_string(acquired_) + ", slot " + std::to_string(slot) + ")";
  switch (timeline_.phase(slot)) {
    case Phase::kFree:
      return "wait for a worker" + where;
    case Phase::kPlan:
      return "plan" + where;
    case Phase::kDrain:
      return "wait for the device to free the slot" + where;
    case Phase::kAssemble:
      return "assemble" + where;
    case Phase::kProduce: {
      const int stream = late_stream(slot);
      const auto& regions = planner_.spec().layouts[slots_[slot].plan.layout].regions;
      for (size_t m = 0; m < regions.size(); ++m) {
        const Work& work = slots_[slot].work[m];
        const auto count = static_cast<int64_t>(slots_[slot].plan.regions[m].samples.size());
        if (work.left > count - work.next)
          return "read stream " + std::to_string(regions[m].stream) + where;
      }
      return "wait for a reader of stream " + std::to_string(stream) + where;
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
