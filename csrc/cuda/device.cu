#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace uml {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Selects a device for the calling thread and restores the one before, unless the thread `stays`.
// The loader's own threads stay: to go back to device 0 would make a context there (CUDA 12 and
// later), hundreds of MB for each rank. They may also call what a graph that another thread
// captures meanwhile would otherwise take for an error.
class Selected {
 public:
  explicit Selected(int index, bool stays = false) : stays_(stays) {
    cudaGetDevice(&before_);
    check(cudaSetDevice(index), "select the device");
    if (!stays_) return;
    auto mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "let other threads capture graphs");
  }
  ~Selected() {
    if (!stays_) cudaSetDevice(before_);
  }
  Selected(const Selected&) = delete;
  Selected& operator=(const Selected&) = delete;

 private:
  int before_ = 0;
  bool stays_;
};

cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(Event event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

CudaDevice::CudaDevice(int index) : index_(index) {
  const Selected selected(index_);
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create the copy stream");
  copy_stream_ = stream;
}

CudaDevice::~CudaDevice() { cudaStreamDestroy(stream_of(copy_stream_)); }

Block CudaDevice::allocate(size_t bytes) {
  const Selected selected(index_);
  Block block{nullptr, nullptr, bytes};
  void* host = nullptr;
  void* device = nullptr;
  check(cudaHostAlloc(&host, bytes, cudaHostAllocDefault), "allocate a pinned slot");
  const cudaError_t status = cudaMalloc(&device, bytes);
  if (status != cudaSuccess) {
    cudaFreeHost(host);
    check(status, "allocate a device slot");
  }
  block.host = static_cast<std::byte*>(host);
  block.device = static_cast<std::byte*>(device);
  try {
    std::memset(host, 0, bytes);
    check(cudaMemset(device, 0, bytes), "clear a device slot");
  } catch (...) {
    free(block);
    throw;
  }
  return block;
}

void CudaDevice::free(const Block& block) noexcept {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(index_);
  cudaFree(block.device);
  cudaFreeHost(block.host);
  cudaSetDevice(before);
}

Event CudaDevice::make_event() {
  const Selected selected(index_);
  cudaEvent_t event;
  // a thread that waits sleeps: it would spin on a core that others decode on
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync),
        "create an event");
  return event;
}

void CudaDevice::free_event(Event event) noexcept { cudaEventDestroy(event_of(event)); }

void CudaDevice::record(Event event, Stream stream) {
  const Selected selected(index_, stream == copy_stream_);
  check(cudaEventRecord(event_of(event), stream_of(stream)), "record an event");
}

void CudaDevice::wait(Event event, Stream stream) {
  const Selected selected(index_, stream == copy_stream_);
  check(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "wait for an event");
}

void CudaDevice::synchronize(Event event) {
  const Selected selected(index_, true);
  check(cudaEventSynchronize(event_of(event)), "synchronise with an event");
}

void CudaDevice::upload(const Block& block, size_t bytes) {
  const Selected selected(index_, true);
  check(cudaMemcpyAsync(block.device, block.host, bytes, cudaMemcpyHostToDevice,
                        stream_of(copy_stream_)),
        "copy a slot to the device");
}

int cuda_device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace uml
