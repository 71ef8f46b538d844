// The loader against a device that works behind the caller's back: order, reuse of slots, shutdown,
// errors.
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/loader.h"
#include "fake_device.h"

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

void a_pack_that_the_device_refused_is_not_lost() {
  const Fixture data;
  auto device = std::make_shared<FakeDevice>();
  FakeStream stream;
  const auto loader = data.loader(device, 2, 1);
  Planner planner(joint_spec(data.a, data.b, 120, 40));
  PackPlan plan;
  loader->release(loader->acquire(10.0, &stream).value(), &stream);
  planner.next(plan);
  while (loader->ready() < 1) std::this_thread::sleep_for(milliseconds(1));
  device->must_refuse = true;
  bool is_refused = false;
  try {
    loader->acquire(10.0, &stream);
  } catch (const std::runtime_error&) {
    is_refused = true;
  }
  CHECK(is_refused);
  for (int k = 0; k < 5; ++k) {
    const int slot = loader->acquire(10.0, &stream).value();
    planner.next(plan);
    CHECK(loader->plan(slot).regions == plan.regions);
    loader->release(slot, &stream);
  }
  loader->close();
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
  uml::packs_do_not_depend_on_threads();
  uml::a_held_slot_is_never_overwritten();
  uml::steps_allocate_nothing();
  uml::shutdown_works_in_every_state();
  uml::a_stalled_worker_is_named_and_a_failed_one_reported();
  uml::a_pack_that_the_device_refused_is_not_lost();
  uml::a_restored_loader_continues();
}
