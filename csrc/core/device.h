// The device a loader fills slots for, as the few operations it needs. Nothing in csrc/core knows
// CUDA.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace uml {

// A slot's memory: what the workers write and what the consumer reads (the same where the device is
// the host).
struct Block {
  std::byte* host = nullptr;
  std::byte* device = nullptr;
  size_t bytes = 0;
};

// An ordered queue of work on the device; null is the device's default.
using Stream = void*;
// A point in a stream that others can wait for. An event that was never recorded counts as reached.
using Event = void*;

// Implementations are thread-safe: workers and the consumer call at the same time.
class Device {
 public:
  virtual ~Device() = default;

  // Memory for one slot, zeroed and aligned to 64 bytes; the caller frees it. Throws std::bad_alloc
  // or std::runtime_error.
  virtual Block allocate(size_t bytes) = 0;
  virtual void free(const Block& block) noexcept = 0;

  virtual Event make_event() = 0;
  virtual void free_event(Event event) noexcept = 0;
  // Marks the work put into `stream` so far.
  virtual void record(Event event, Stream stream) = 0;
  // Makes later work of `stream` wait for `event`; does not block the caller.
  virtual void wait(Event event, Stream stream) = 0;
  // Blocks the caller until `event` is reached.
  virtual void synchronize(Event event) = 0;

  // The stream of uploads.
  virtual Stream copy_stream() = 0;
  // Starts copying the first `bytes` of a block to the device in the copy stream.
  virtual void upload(const Block& block, size_t bytes) = 0;
};

// The host itself: a slot is read where it was written and all work is done when a call returns.
class HostDevice final : public Device {
 public:
  Block allocate(size_t bytes) override {
    const size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
    auto* memory = static_cast<std::byte*>(::operator new(rounded, std::align_val_t{kAlign}));
    for (size_t i = 0; i < rounded; ++i) memory[i] = std::byte{0};
    return {memory, memory, bytes};
  }
  void free(const Block& block) noexcept override {
    ::operator delete(block.host, std::align_val_t{kAlign});
  }
  Event make_event() override { return nullptr; }
  void free_event(Event) noexcept override {}
  void record(Event, Stream) override {}
  void wait(Event, Stream) override {}
  void synchronize(Event) override {}
  Stream copy_stream() override { return nullptr; }
  void upload(const Block&, size_t) override {}

 private:
  static constexpr size_t kAlign = 64;
};

}  // namespace uml
