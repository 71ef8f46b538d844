#include <cuda_runtime.h>

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

cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(Event event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

CudaDevice::CudaDevice(int index) : index_(index) {
  select();
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create the copy stream");
  copy_stream_ = stream;
}

CudaDevice::~CudaDevice() { cudaStreamDestroy(stream_of(copy_stream_)); }

// The current device belongs to the calling thread, so every entry selects it.
void CudaDevice::select() const { check(cudaSetDevice(index_), "select the device"); }

Block CudaDevice::allocate(size_t bytes) {
  select();
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
    check(cudaMemset(host, 0, bytes), "clear a pinned slot");
    check(cudaMemset(device, 0, bytes), "clear a device slot");
  } catch (...) {
    free(block);
    throw;
  }
  return block;
}

void CudaDevice::free(const Block& block) noexcept {
  cudaSetDevice(index_);
  cudaFree(block.device);
  cudaFreeHost(block.host);
}

Event CudaDevice::make_event() {
  select();
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "create an event");
  return event;
}

void CudaDevice::free_event(Event event) noexcept { cudaEventDestroy(event_of(event)); }

void CudaDevice::record(Event event, Stream stream) {
  select();
  check(cudaEventRecord(event_of(event), stream_of(stream)), "record an event");
}

void CudaDevice::wait(Event event, Stream stream) {
  select();
  check(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "wait for an event");
}

bool CudaDevice::query(Event event) {
  select();
  const cudaError_t status = cudaEventQuery(event_of(event));
  if (status == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  check(status, "query an event");
  return true;
}

void CudaDevice::synchronize(Event event) {
  select();
  check(cudaEventSynchronize(event_of(event)), "synchronise with an event");
}

void CudaDevice::upload(const Block& block, size_t bytes) {
  select();
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
