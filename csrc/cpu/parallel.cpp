#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace uml {
namespace {

struct Loop {
  RangeBody body;
  void* context;
  int64_t items;
  int64_t grain;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t begin = next.fetch_add(grain); begin < items; begin = next.fetch_add(grain)) {
      body(context, begin, std::min(begin + grain, items));
    }
  }
};

// Threads that sleep between loops; used where the process has no OpenMP to borrow.
class Pool {
 public:
  void run(int helpers, Loop& loop) {
    const std::lock_guard one_at_a_time(run_mutex_);
    {
      const std::lock_guard lock(mutex_);
      while (static_cast<int>(threads_.size()) < helpers)
        threads_.emplace_back([this] { serve(); });
      loop_ = &loop;
      wanted_ = helpers;
    }
    wake_.notify_all();
    loop.work();
    std::unique_lock lock(mutex_);
    loop_ = nullptr;
    wanted_ = 0;
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      Loop* loop = loop_;
      --wanted_;
      ++busy_;
      lock.unlock();
      loop->work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex run_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> threads_;
  Loop* loop_ = nullptr;
  int wanted_ = 0;
  int busy_ = 0;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them and
// gets a new pool.
Pool* pool = nullptr;
std::once_flag pool_once;

Pool& shared_pool() {
  std::call_once(pool_once, [] {
    pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
  });
  return *pool;
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

struct Scratch {
  float* data = nullptr;
  size_t floats = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

void use_openmp(std::uintptr_t address) {
  gomp_parallel.store(reinterpret_cast<GompParallel>(address));
}

void parallel_for(int threads, int64_t items, int64_t grain, RangeBody body, void* context) {
  if (items <= 0) return;
  const int64_t chunks = (items + grain - 1) / grain;
  const int team = static_cast<int>(std::min<int64_t>(threads, chunks));
  Loop loop{body, context, items, grain};
  if (team <= 1) {
    loop.work();
  } else if (const GompParallel gomp = gomp_parallel.load()) {
    gomp([](void* data) { static_cast<Loop*>(data)->work(); }, &loop, static_cast<unsigned>(team),
         0);
  } else {
    shared_pool().run(team - 1, loop);
  }
}

float* thread_scratch(size_t floats) {
  thread_local Scratch scratch;
  if (scratch.floats < floats) {
    std::free(scratch.data);
    const size_t rounded = (floats + 1023) / 1024 * 1024;
    scratch.data = static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float)));
    scratch.floats = scratch.data ? rounded : 0;
    if (!scratch.data) {
      std::fprintf(stderr, "uml_fast: no memory for %zu bytes of scratch in a CPU kernel\n",
                   rounded * sizeof(float));
      std::abort();
    }
  }
  return scratch.data;
}

}  // namespace uml
