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
#include "core/planner.h"
#include "core/slot_memory.h"
#include "core/timeline.h"

namespace uml {

// A part of the rows that producers write: consecutive samples of one region of one pack. The spans
// hold until the job is finished.
struct Job {
  int64_t pack = 0;
  int slot = 0;
  int region = 0;
  int stream = 0;
  int64_t first = 0;                 // place of the first sample in its region
  std::span<const int64_t> samples;  // indices in the source, in packed order
  std::span<const int64_t> epochs;   // the epoch that each sample is taken from
  std::byte* rows = nullptr;         // where their rows go, one after the other
  size_t bytes = 0;
};

// One consumer thread; the order of packs depends on the planner alone, never on the workers' or
// producers' timing. Threads start with the first acquire and end with close.
class Loader {
 public:
  // Jobs of producers are of `job_bytes` or as few samples as reach that. Throws
  // std::invalid_argument for sources that do not match the planner's streams.
  Loader(PlannerSpec spec, std::vector<SourceSpec> sources, std::shared_ptr<Device> device,
         int slots, int threads, int64_t job_bytes = 1 << 18);
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

  // For the producers of sources without rows, any number of threads: a part of the oldest pack
  // that nobody has taken, or nothing after `wait_s` seconds or once closed.
  std::optional<Job> take(double wait_s);
  // The rows of a job are written; `rejected` are places in its samples that become padding.
  void finish(const Job& job, std::span<const int64_t> rejected);
  // Stops the loader: acquire throws std::runtime_error(what).
  void fail(const std::string& what);

  // Before load: stops the workers and hands out no more jobs; false where producers still hold
  // some after `wait_s` seconds.
  bool drain(double wait_s);
  // Drops what was made ahead, frees all slots and continues from a planner state (Planner::load).
  // Throws std::runtime_error while producers hold jobs.
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
  // Where the time went since the loader was made.
  Totals totals() const;
  // Keeps the last `capacity` events from now on; see Timeline.
  void trace(size_t capacity);
  std::vector<TraceEvent> events() const;

  const SlotMap& map(int layout) const { return maps_[layout]; }
  const std::shared_ptr<SlotMemory>& memory() const { return memory_; }
  size_t state_size() const { return planner_.state_size(); }

 private:
  // What producers have still to do for a region.
  struct Work {
    int64_t next = 0;      // first sample that nobody has taken
    int64_t next_row = 0;  // its first row in the region
    int64_t left = 0;      // samples that are not finished
  };
  struct Slot {
    uint64_t pack = 0;
    std::vector<Work> work;  // per region
    PackPlan plan;
    std::vector<int64_t> state;
  };

  void start();
  void stop();
  void work();
  void make_pack(int slot);
  void send(int slot);
  void set_error(std::exception_ptr error);
  // Under the mutex.
  void enter(int slot, Phase phase, int stream = -1);
  int late_stream(int slot) const;
  bool cut_job(int slot, Job& job);

  Planner planner_;
  std::vector<SourceSpec> sources_;
  std::vector<SlotMap> maps_;
  std::shared_ptr<SlotMemory> memory_;
  int threads_;
  int64_t job_bytes_;

  mutable std::mutex mutex_;  // guards everything below, of slots_ all but plan and state
  Timeline timeline_;
  std::condition_variable changed_;
  std::vector<Slot> slots_;
  std::vector<std::thread> workers_;
  uint64_t claimed_ = 0;   // packs the workers have begun; pack i lies in slot i % slots
  uint64_t acquired_ = 0;  // packs the consumer got
  int taken_ = 0;          // jobs in the hands of producers
  bool is_planning_ = false;
  bool is_stopping_ = false;
  bool is_closed_ = false;
  std::exception_ptr error_;
};

}  // namespace uml
