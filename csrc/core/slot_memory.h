// The memory that packs lie in and the events that say when it may be written again.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "core/device.h"

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

}  // namespace uml
