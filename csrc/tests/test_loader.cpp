// The loader against a device that works behind the caller's back: order, reuse of slots, shutdown,
// errors.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/loader.h"
#include "ragged_data.h"

namespace {
std::atomic<int64_t> allocations{0};
}

// Not inlined: GCC would take the pairing of new with free for a mistake.
[[gnu::noinline]] void* operator new(size_t size) {
  ++allocations;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace uml {
namespace {

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
  Block allocate(size_t bytes) override {
    return {new std::byte[bytes](), new std::byte[bytes](), bytes};
  }
  void free(const Block& block) noexcept override {
    delete[] block.host;
    delete[] block.device;
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
      std::memcpy(block.device, block.host, bytes);
    });
  }

  std::atomic<bool> must_fail{false};
  std::atomic<bool> must_hang{false};

 private:
  static int64_t recorded(FakeEvent* e) {
    std::lock_guard lock(e->mutex);
    return e->recorded;
  }
  std::deque<std::unique_ptr<FakeEvent>> events_;
  FakeStream copies_;
};

struct Fixture {
  RaggedData a{50, 1, 30, 4};
  RaggedData b{17, 5, 40, 1};
  std::unique_ptr<Loader> loader(std::shared_ptr<Device> device, int slots, int threads) const {
    return std::make_unique<Loader>(joint_spec(a, b, 120, 40),
                                    std::vector<SourceSpec>{a.source(), b.source()},
                                    std::move(device), slots, threads);
  }
};

// The consumer lets go of a slot as soon as its slow work is queued; the work must still see its
// own pack.
void slots_outlive_the_work_that_reads_them() {
  const Fixture data;
  Planner planner(joint_spec(data.a, data.b, 120, 40));
  auto device = std::make_shared<FakeDevice>();
  std::atomic<int> wrong{0};
  {
    FakeStream compute;
    const auto loader = data.loader(device, 2, 2);
    const auto memory = loader->memory();
    PackPlan plan;
    for (int k = 0; k < 40; ++k) {
      const int slot = loader->acquire(10.0, &compute).value();
      planner.next(plan);
      const Field field = loader->map(0).sample;
      const std::byte* at = memory->block(slot).device + field.offset;
      compute.push([at, expected = plan.regions[0].samples, &wrong] {
        std::this_thread::sleep_for(milliseconds(3));
        wrong += std::memcmp(at, expected.data(), expected.size() * sizeof(int64_t)) != 0;
      });
      loader->release(slot, &compute);
    }
    loader->close();
  }
  CHECK(wrong == 0);
}

void packs_do_not_depend_on_threads() {
  const Fixture data;
  const auto one = data.loader(std::make_shared<HostDevice>(), 1, 1);
  const auto many = data.loader(std::make_shared<HostDevice>(), 5, 3);
  for (int k = 0; k < 300; ++k) {
    const int i = one->acquire(10.0, nullptr).value();
    const int j = many->acquire(10.0, nullptr).value();
    CHECK(std::memcmp(one->memory()->block(i).host, many->memory()->block(j).host,
                      one->map(0).bytes) == 0);
    one->release(i, nullptr);
    many->release(j, nullptr);
  }
}

void a_held_slot_is_never_overwritten() {
  const Fixture data;
  const auto loader = data.loader(std::make_shared<HostDevice>(), 3, 2);
  const int held = loader->acquire(10.0, nullptr).value();
  const Block& block = loader->memory()->block(held);
  const std::vector<std::byte> before(block.host, block.host + block.bytes);
  for (int k = 0; k < 2; ++k) loader->release(loader->acquire(10.0, nullptr).value(), nullptr);
  CHECK(!loader->acquire(0.05, nullptr).has_value());
  CHECK(loader->stage().starts_with("all slots are held"));
  CHECK(std::memcmp(before.data(), block.host, block.bytes) == 0);
  loader->release(held, nullptr);
  CHECK(loader->acquire(10.0, nullptr) == held);
}

void steps_allocate_nothing() {
  const Fixture data;
  const auto loader = data.loader(std::make_shared<HostDevice>(), 3, 2);
  const auto step = [&] { loader->release(loader->acquire(10.0, nullptr).value(), nullptr); };
  for (int k = 0; k < 100; ++k) step();
  const int64_t before = allocations;
  for (int k = 0; k < 500; ++k) step();
  CHECK(allocations == before);
}

void shutdown_works_in_every_state() {
  const Fixture data;
  {
    const auto unused = data.loader(std::make_shared<HostDevice>(), 2, 2);
  }
  {
    const auto loader = data.loader(std::make_shared<HostDevice>(), 2, 3);
    loader->acquire(10.0, nullptr);
    std::this_thread::sleep_for(milliseconds(20));  // workers wait for a free slot
    loader->close();
    loader->close();
    bool is_refused = false;
    try {
      loader->acquire(10.0, nullptr);
    } catch (const std::runtime_error&) {
      is_refused = true;
    }
    CHECK(is_refused);
  }
  {
    auto device = std::make_shared<FakeDevice>();
    device->must_hang = true;
    const auto loader = data.loader(device, 2, 1);
    std::thread closer([&] {
      std::this_thread::sleep_for(milliseconds(30));
      device->must_hang = false;
      loader->close();
    });
    FakeStream stream;
    try {
      while (true) loader->release(loader->acquire(10.0, &stream).value(), &stream);
    } catch (const std::runtime_error&) {  // closed while the consumer waited
    }
    closer.join();
  }
}

void a_stalled_worker_is_named_and_a_failed_one_reported() {
  const Fixture data;
  auto device = std::make_shared<FakeDevice>();
  FakeStream stream;
  device->must_hang = true;
  const auto loader = data.loader(device, 2, 1);
  CHECK(!loader->acquire(0.05, &stream).has_value());
  CHECK(loader->stage() == "upload (pack 0, slot 0)");
  device->must_fail = true;
  device->must_hang = false;
  std::string message;
  try {
    for (int k = 0; k < 5; ++k) loader->release(loader->acquire(10.0, &stream).value(), &stream);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  CHECK(message == "the copy failed");
}

void a_restored_loader_continues() {
  const Fixture data;
  const auto loader = data.loader(std::make_shared<HostDevice>(), 3, 2);
  std::vector<int64_t> state;
  std::vector<std::vector<Picks>> later;
  for (int k = 0; k < 60; ++k) {
    const int slot = loader->acquire(10.0, nullptr).value();
    if (k == 20) state.assign(loader->state(slot).begin(), loader->state(slot).end());
    if (k > 20) later.push_back(loader->plan(slot).regions);
    loader->release(slot, nullptr);
  }
  loader->load(state, {});
  for (const auto& picks : later) {
    const int slot = loader->acquire(10.0, nullptr).value();
    CHECK(loader->plan(slot).regions == picks);
    loader->release(slot, nullptr);
  }
}

}  // namespace
}  // namespace uml

int main() {
  uml::slots_outlive_the_work_that_reads_them();
  uml::packs_do_not_depend_on_threads();
  uml::a_held_slot_is_never_overwritten();
  uml::steps_allocate_nothing();
  uml::shutdown_works_in_every_state();
  uml::a_stalled_worker_is_named_and_a_failed_one_reported();
  uml::a_restored_loader_continues();
}
