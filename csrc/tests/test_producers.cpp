// A slot is never written while somebody reads it, whoever fills it; producers of sources without
// rows: parts, late finishes, stalls.
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/loader.h"
#include "fake_device.h"

namespace uml {
namespace {

// Threads that write the rows of both sources of a fixture until the loader closes.
class Producers {
 public:
  Producers(const Fixture& data, Loader& loader, int threads) {
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this, &data, &loader] { run(data, loader); });
    }
  }
  ~Producers() {
    is_stopping_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

  static void write(const Fixture& data, const Job& job) {
    const RaggedData& source = job.stream == 0 ? data.a : data.b;
    std::byte* to = job.rows;
    for (const int64_t i : job.samples) {
      const auto first = static_cast<size_t>(source.offsets[i]) * source.row_bytes;
      const auto end = static_cast<size_t>(source.offsets[i + 1]) * source.row_bytes;
      std::memcpy(to, source.rows.data() + first, end - first);
      to += end - first;
    }
    CHECK(to == job.rows + job.bytes);
  }

 private:
  void run(const Fixture& data, Loader& loader) {
    while (!is_stopping_) {
      const auto job = loader.take(0.01);
      if (!job) continue;
      write(data, *job);
      loader.finish(*job, {});
    }
  }

  std::atomic<bool> is_stopping_{false};
  std::vector<std::thread> threads_;
};

// The consumer lets go of a slot as soon as its slow work is queued; the work must still see its
// own pack, all of it.
void slots_outlive_the_work_that_reads_them(bool is_shared, bool is_produced) {
  const Fixture data;
  const auto whole = data.loader(std::make_shared<HostDevice>(), 1, 1);
  auto device = std::make_shared<FakeDevice>(is_shared);
  std::atomic<int> wrong{0};
  {
    FakeStream compute;
    const auto loader = data.loader(device, 2, 2, is_produced);
    const Producers producers(data, *loader, is_produced ? 3 : 0);
    const auto memory = loader->memory();
    for (int k = 0; k < 40; ++k) {
      const int slot = loader->acquire(10.0, &compute).value();
      const int same = whole->acquire(10.0, nullptr).value();
      const Block& pack = whole->memory()->block(same);
      compute.push([at = memory->block(slot).device, &wrong,
                    expected = std::vector(pack.host, pack.host + whole->map(0).bytes)] {
        wrong += std::memcmp(at, expected.data(), expected.size()) != 0;
        std::this_thread::sleep_for(milliseconds(3));
        wrong += std::memcmp(at, expected.data(), expected.size()) != 0;
      });
      whole->release(same, nullptr);
      loader->release(slot, &compute);
    }
    loader->close();
  }
  CHECK(wrong == 0);
}

void jobs_are_parts_of_the_oldest_pack() {
  const Fixture data;
  const auto loader = data.loader(std::make_shared<HostDevice>(), 3, 1, true);
  CHECK(!loader->acquire(0.05, nullptr).has_value());
  CHECK(loader->stage() == "wait for a reader of stream 0 (pack 0, slot 0)");
  std::vector<Job> jobs;
  int64_t pack = 0;
  int parts = 0;
  while (const auto job = loader->take(0.05)) {
    CHECK(job->pack >= pack);
    pack = job->pack;
    parts += pack == 0;
    const RaggedData& source = job->stream == 0 ? data.a : data.b;
    const int64_t last = job->samples.back();
    const auto rows = static_cast<size_t>(source.offsets[last + 1] - source.offsets[last]);
    CHECK(job->bytes - rows * source.row_bytes < 64);
    CHECK(job->samples.size() == job->epochs.size());
    jobs.push_back(*job);
  }
  CHECK(pack == 2 && parts > 4);
  CHECK(loader->stage() == "read stream 0 (pack 0, slot 0)");
  // Finished in the reverse order, the packs still come in theirs.
  for (auto job = jobs.rbegin(); job != jobs.rend(); ++job) {
    Producers::write(data, *job);
    loader->finish(*job, {});
  }
  for (int k = 0; k < 3; ++k) CHECK(loader->acquire(10.0, nullptr).value() == k);
  const Totals totals = loader->totals();
  const auto produce = static_cast<size_t>(Phase::kProduce);
  CHECK(totals.phase[produce] > 0 && totals.stall[produce] > 0);
  CHECK(totals.produce_stall[0] > 0);
}

void a_read_under_way_holds_up_loading_but_not_closing() {
  const Fixture data;
  const auto loader = data.loader(std::make_shared<HostDevice>(), 2, 1, true);
  std::vector<int64_t> start(loader->state_size());
  loader->save(start);
  CHECK(!loader->acquire(0.02, nullptr).has_value());
  const Job job = loader->take(1.0).value();
  CHECK(!loader->drain(0.02));
  bool is_refused = false;
  try {
    loader->load(start, {});
  } catch (const std::runtime_error&) {
    is_refused = true;
  }
  CHECK(is_refused);
  loader->finish(job, {});
  CHECK(loader->drain(1.0));
  loader->load(start, {});
  {
    const Producers producers(data, *loader, 2);
    for (int k = 0; k < 5; ++k) loader->release(loader->acquire(10.0, nullptr).value(), nullptr);
  }
  while (const auto slot = loader->acquire(0.02, nullptr)) loader->release(*slot, nullptr);
  const Job late = loader->take(1.0).value();
  loader->close();
  CHECK(!loader->take(0.0).has_value());
  Producers::write(data, late);  // its memory is still there
  loader->finish(late, {});
}

void a_trace_has_every_phase_of_the_last_packs() {
  const Fixture data;
  const auto loader = data.loader(std::make_shared<HostDevice>(), 2, 1);
  loader->trace(32);
  for (int k = 0; k < 20; ++k) loader->release(loader->acquire(10.0, nullptr).value(), nullptr);
  const std::vector<TraceEvent> events = loader->events();
  CHECK(events.size() == 32);
  int held = 0;
  for (const TraceEvent& e : events) {
    CHECK(e.begin_ns <= e.end_ns && e.slot == e.pack % 2);
    held += e.phase == static_cast<int16_t>(Phase::kHeld);
  }
  CHECK(held >= 3 && held <= 6);
}

}  // namespace
}  // namespace uml

int main() {
  for (const bool is_shared : {false, true}) {
    for (const bool is_produced : {false, true}) {
      uml::slots_outlive_the_work_that_reads_them(is_shared, is_produced);
    }
  }
  uml::jobs_are_parts_of_the_oldest_pack();
  uml::a_read_under_way_holds_up_loading_but_not_closing();
  uml::a_trace_has_every_phase_of_the_last_packs();
}
