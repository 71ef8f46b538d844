#include "core/slot_memory.h"

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

}  // namespace uml
