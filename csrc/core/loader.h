// Worker threads that plan and assemble packs ahead of the consumer into a ring of slots.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "core/assemble.h"
#include "core/device.h"
#include "core/planner.h"

namespace uml {

// The memory and events of a ring; whoever reads a slot shares its ownership.
class SlotMemory {
 public:
  SlotMemory(std::shared_ptr<Device> device, int slots, size_t bytes);
  ~SlotMemory() { clear(); }
  SlotMemory(const SlotMemory&) = delete;
  SlotMemory& operator=(const SlotMemory&) = delete;

  Device& device() { return *device_; }
  const Block& block(int slot) const { return blocks_[slot]; }
  Event uploaded(int slot) const { return uploaded_[slot]; }
  Event released(int slot) const { return released_[slot]; }

 private:
  void clear() noexcept;

  std::shared_ptr<Device> device_;
  std::vector<Block> blocks_;
  std::vector<Event> uploaded_;  // the slot's pack is on the device, its host memory is free
  std::vector<Event> released_;  // the consumer's work on the slot is done
};

// Rows that a producer writes: the samples of one region of one pack, one after the other.
struct Job {
  int slot = 0;
  int region = 0;
  uint64_t generation = 0;           // of load; jobs of an earlier one come to nothing
  std::span<const int64_t> samples;  // indices in the source, in packed order
  std::span<const int64_t> epochs;   // the epoch that each sample is taken from
  std::byte* rows = nullptr;
};

// One consumer thread; the order of packs depends on the planner alone, never on the workers' or
// producers' timing. Threads start with the first acquire and end with close.
class Loader {
 public:
  // Throws std::invalid_argument for sources that do not match the planner's streams.
  Loader(PlannerSpec spec, std::vector<SourceSpec> sources, std::shared_ptr<Device> device,
         int slots, int threads);
  ~Loader() { close(); }
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  // The slot of the next pack, or nothing after `wait_s` seconds. Later work of `stream` waits
  // until the pack is on the device. The slot stays the caller's until released. Throws what
  // stopped a worker, or std::runtime_error once closed.
  std::optional<int> acquire(double wait_s, Stream stream);
  // Gives the slot back; it is overwritten only after the work put into `stream` so far.
  void release(int slot, Stream stream);
  // Stops and joins the threads. Any number of times, from any state.
  void close();

  // For the producers of a source without rows, any number of threads: the oldest job of a stream
  // that nobody has taken, or nothing after `wait_s` seconds or once closed.
  std::optional<Job> take(int stream, double wait_s);
  // The rows of a job are written; `rejected` are places in its samples that become padding.
  void finish(const Job& job, std::span<const int64_t> rejected);
  // Stops the loader: acquire throws std::runtime_error(what).
  void fail(const std::string& what);

  // Drops what was made ahead, waits for the jobs that are taken, frees all slots and continues
  // from a planner state (Planner::load).
  void load(std::span<const int64_t> state, std::vector<Deal> deals);

  // The planner's state; only before the first acquire, later states belong to slots.
  void save(std::span<int64_t> state) const;

  // Of an acquired slot: index of its layout, its samples, and the planner state right after it.
  int layout(int slot) const { return slots_[slot].plan.layout; }
  const PackPlan& plan(int slot) const { return slots_[slot].plan; }
  std::span<const int64_t> state(int slot) const { return slots_[slot].state; }

  // Packs that wait for the consumer.
  int ready() const;
  // What the pack that the consumer waits for is waiting for, in words.
  std::string stage() const;

  const SlotMap& map(int layout) const { return maps_[layout]; }
  const std::shared_ptr<SlotMemory>& memory() const { return memory_; }
  size_t state_size() const { return planner_.state_size(); }

 private:
  enum class Phase { kFree, kPlan, kDrain, kAssemble, kProduce, kUpload, kReady, kHeld };
  enum class Work { kNone, kWaiting, kTaken };
  struct Slot {
    Phase phase = Phase::kFree;
    std::vector<Work> work;  // per region, what producers have to do
    PackPlan plan;
    std::vector<int64_t> state;
  };

  void start();
  void stop();
  void work();
  void make_pack(int slot);
  void send(int slot);
  void set_error(std::exception_ptr error);
  void enter(int slot, Phase phase);

  Planner planner_;
  std::vector<SourceSpec> sources_;
  std::vector<SlotMap> maps_;
  std::shared_ptr<SlotMemory> memory_;
  int threads_;

  mutable std::mutex mutex_;  // guards everything below and the phases of slots_
  std::condition_variable changed_;
  std::vector<Slot> slots_;
  std::vector<std::thread> workers_;
  uint64_t claimed_ = 0;   // packs the workers have begun; pack i lies in slot i % slots
  uint64_t acquired_ = 0;  // packs the consumer got
  uint64_t generation_ = 0;
  int taken_ = 0;  // jobs in the hands of producers
  bool is_planning_ = false;
  bool is_stopping_ = false;
  bool is_closed_ = false;
  std::exception_ptr error_;
};

}  // namespace uml
