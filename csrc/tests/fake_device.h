// A device that works behind the caller's back, and a loader of two sources to try on it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "core/loader.h"
#include "ragged_data.h"

namespace uml {

using std::chrono::milliseconds;

// Runs what it is given in order, on its own thread, like a CUDA stream.
class FakeStream {
 public:
  FakeStream() : thread_([this] { run(); }) {}
  ~FakeStream() {
    push({});
    thread_.join();
  }
  void push(std::function<void()> work) {
    std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }

 private:
  void run() {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return !queue_.empty(); });
      const std::function<void()> work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      if (!work) return;
      work();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  std::thread thread_;
};

// Counts how often it was recorded and reached.
struct FakeEvent {
  std::mutex mutex;
  std::condition_variable changed;
  int64_t recorded = 0;
  int64_t reached = 0;

  void wait_for(int64_t count) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return reached >= count; });
  }
};

// Host and device memory are apart, uploads and the consumer's work run on streams of their own.
class FakeDevice final : public Device {
 public:
  // Where memory is shared, the device reads what the host wrote and uploads copy nothing.
  explicit FakeDevice(bool is_shared = false) : is_shared_(is_shared) {}

  Block allocate(size_t bytes) override {
    auto* host = new std::byte[bytes]();
    return {host, is_shared_ ? host : new std::byte[bytes](), bytes};
  }
  void free(const Block& block) noexcept override {
    if (!is_shared_) delete[] block.device;
    delete[] block.host;
  }
  Event make_event() override { return events_.emplace_back(new FakeEvent).get(); }
  // As on CUDA, work that is queued may still refer to an event that was freed: they live as long
  // as the device.
  void free_event(Event) noexcept override {}
  void record(Event event, Stream stream) override {
    auto* e = static_cast<FakeEvent*>(event);
    int64_t count;
    {
      std::lock_guard lock(e->mutex);
      count = ++e->recorded;
    }
    static_cast<FakeStream*>(stream)->push([e, count] {
      std::lock_guard lock(e->mutex);
      e->reached = count;
      e->changed.notify_all();
    });
  }
  void wait(Event event, Stream stream) override {
    auto* e = static_cast<FakeEvent*>(event);
    if (must_refuse.exchange(false)) throw std::runtime_error("the device refused");
    const int64_t count = recorded(e);
    static_cast<FakeStream*>(stream)->push([e, count] { e->wait_for(count); });
  }
  void synchronize(Event event) override {
    auto* e = static_cast<FakeEvent*>(event);
    e->wait_for(recorded(e));
  }
  Stream copy_stream() override { return &copies_; }
  void upload(const Block& block, size_t bytes) override {
    if (must_fail) throw std::runtime_error("the copy failed");
    while (must_hang) std::this_thread::sleep_for(milliseconds(1));
    copies_.push([block, bytes] {
      std::this_thread::sleep_for(milliseconds(1));
      if (block.device != block.host) std::memcpy(block.device, block.host, bytes);
    });
  }

  std::atomic<bool> must_fail{false};
  std::atomic<bool> must_hang{false};
  std::atomic<bool> must_refuse{false};  // the next wait throws

 private:
  static int64_t recorded(FakeEvent* e) {
    std::lock_guard lock(e->mutex);
    return e->recorded;
  }
  bool is_shared_;
  std::deque<std::unique_ptr<FakeEvent>> events_;
  FakeStream copies_;
};

struct Fixture {
  RaggedData a{50, 1, 30, 4};
  RaggedData b{17, 5, 40, 1};
  std::unique_ptr<Loader> loader(std::shared_ptr<Device> device, int slots, int threads,
                                 bool is_produced = false) const {
    std::vector<SourceSpec> sources{a.source(), b.source()};
    if (is_produced) sources[0].rows = sources[1].rows = nullptr;
    return std::make_unique<Loader>(joint_spec(a, b, 120, 40), sources, std::move(device), slots,
                                    threads, 64);
  }
};

}  // namespace uml
