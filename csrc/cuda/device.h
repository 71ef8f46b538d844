// A CUDA device for the loader: pinned slots, one copy stream, events.
#pragma once

#include "core/device.h"

namespace uml {

class CudaDevice final : public Device {
 public:
  // Throws std::runtime_error where there is no such device or no driver.
  explicit CudaDevice(int index);
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  Block allocate(size_t bytes) override;
  void free(const Block& block) noexcept override;
  Event make_event() override;
  void free_event(Event event) noexcept override;
  void record(Event event, Stream stream) override;
  void wait(Event event, Stream stream) override;
  void synchronize(Event event) override;
  Stream copy_stream() override { return copy_stream_; }
  void upload(const Block& block, size_t bytes) override;

  int index() const { return index_; }

 private:
  int index_;
  Stream copy_stream_ = nullptr;
};

// Number of usable CUDA devices; 0 without a driver. Never throws.
int cuda_device_count() noexcept;

}  // namespace uml
