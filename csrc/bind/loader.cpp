// Bindings of the planner and the loader. Long calls release the GIL.
#include "core/loader.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/rng.h"

namespace py = pybind11;

namespace {

using Rows = py::array_t<uint8_t, py::array::c_style>;
using Offsets = py::array_t<int64_t, py::array::c_style>;
using Labels = py::array_t<int32_t, py::array::c_style>;
// (key, offsets, share)
using StreamArgs = std::tuple<uint64_t, Offsets, double>;
// (stream, rows, slots, max_len, reserve, close)
using RegionArgs = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t>;
// (regions, order, pace)
using LayoutArgs = std::tuple<std::vector<RegionArgs>, std::vector<int>, double>;
// (rows as bytes, none where producers write them; bytes of a row; labels)
using SourceArgs = std::tuple<Rows, size_t, Labels>;

constexpr std::array<const char*, uml::kPhases> kPhaseNames = {
    "free", "plan", "drain", "assemble", "read", "upload", "ready", "held"};

// (through, epochs, samples)
using DealArgs = std::tuple<int64_t, Offsets, Offsets>;

std::vector<uml::Deal> deals_of(const std::vector<DealArgs>& args) {
  std::vector<uml::Deal> deals;
  for (const auto& [through, epochs, samples] : args) {
    deals.push_back({through,
                     {epochs.data(), epochs.data() + epochs.size()},
                     {samples.data(), samples.data() + samples.size()}});
  }
  return deals;
}

uml::Policy policy_of(const std::string& name) {
  if (name == "joint") return uml::Policy::kJoint;
  if (name == "alternate") return uml::Policy::kAlternate;
  if (name == "warmup") return uml::Policy::kWarmup;
  throw std::invalid_argument("unknown policy " + name);
}

uml::PlannerSpec planner_spec(const std::vector<StreamArgs>& streams,
                              const std::vector<LayoutArgs>& layouts, const std::string& policy,
                              std::vector<int> first_side, double warmup_epochs, uint64_t seed,
                              int rank, int world) {
  uml::PlannerSpec spec;
  for (const auto& [key, offsets, share] : streams) {
    spec.streams.push_back({key, {offsets.data(), static_cast<size_t>(offsets.size())}, share});
  }
  for (const auto& [regions, order, pace] : layouts) {
    uml::LayoutRule layout;
    for (const auto& [stream, rows, slots, max_len, reserve, close] : regions) {
      layout.regions.push_back({stream, rows, slots, max_len, reserve, close});
    }
    layout.order = order;
    layout.pace = pace;
    spec.layouts.push_back(std::move(layout));
  }
  spec.policy = policy_of(policy);
  spec.first_side = std::move(first_side);
  spec.warmup_epochs = warmup_epochs;
  spec.seed = seed;
  spec.rank = rank;
  spec.world = world;
  return spec;
}

py::array_t<int64_t> to_array(std::span<const int64_t> values) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::span<int64_t> span_of(py::array_t<int64_t>& out) {
  return {out.mutable_data(), static_cast<size_t>(out.size())};
}

// (samples, epochs) of each region.
py::list picks_of(const uml::PackPlan& plan, size_t regions) {
  py::list out;
  for (size_t m = 0; m < regions; ++m) {
    const uml::Picks& picks = plan.regions[m];
    out.append(py::make_tuple(to_array(picks.samples), to_array(picks.epochs)));
  }
  return out;
}

// A planner together with the arrays it points into.
struct BoundPlanner {
  std::vector<StreamArgs> streams;
  uml::Planner planner;
  uml::PackPlan plan;

  py::tuple next() {
    {
      py::gil_scoped_release nogil;
      planner.next(plan);
    }
    const size_t regions = planner.spec().layouts[plan.layout].regions.size();
    return py::make_tuple(plan.layout, picks_of(plan, regions));
  }
  py::array_t<int64_t> save() const {
    py::array_t<int64_t> state(static_cast<py::ssize_t>(planner.state_size()));
    planner.save({state.mutable_data(), planner.state_size()});
    return state;
  }
};

// A loader together with the arrays it points into; the loader is last, so its threads end first.
struct BoundLoader {
  std::vector<StreamArgs> streams;
  std::vector<SourceArgs> sources;
  uml::Loader loader;

  // The slot's host bytes as an array that shares ownership of the ring's memory.
  py::array memory(int slot) {
    using Owner = std::shared_ptr<uml::SlotMemory>;
    auto owner = std::make_unique<Owner>(loader.memory());
    const uml::Block block = (*owner)->block(slot);
    py::capsule base(owner.release(), [](void* p) { delete static_cast<Owner*>(p); });
    return py::array(py::dtype::of<uint8_t>(), {block.bytes}, {size_t{1}}, block.host, base);
  }

  // A job as (job, stream, samples, epochs, bytes of its rows), or None.
  py::object take(double wait_s) {
    std::optional<uml::Job> job;
    {
      py::gil_scoped_release nogil;
      job = loader.take(wait_s);
    }
    if (!job) return py::none();
    using Owner = std::shared_ptr<uml::SlotMemory>;
    auto owner = std::make_unique<Owner>(loader.memory());
    py::capsule base(owner.release(), [](void* p) { delete static_cast<Owner*>(p); });
    py::array rows(py::dtype::of<uint8_t>(), {job->bytes}, {size_t{1}}, job->rows, base);
    return py::make_tuple(*job, job->stream, to_array(job->samples), to_array(job->epochs), rows);
  }

  // Seconds since the loader was made: `phase` and `stall` by name, `assemble` and `produce_stall`
  // per stream.
  py::dict totals() const {
    const uml::Totals totals = loader.totals();
    const auto seconds = [](const std::vector<int64_t>& ns) {
      py::list out;
      for (const int64_t n : ns) out.append(static_cast<double>(n) * 1e-9);
      return out;
    };
    py::dict phase;
    py::dict stall;
    for (size_t i = 0; i < uml::kPhases; ++i) {
      phase[kPhaseNames[i]] = static_cast<double>(totals.phase[i]) * 1e-9;
      stall[kPhaseNames[i]] = static_cast<double>(totals.stall[i]) * 1e-9;
    }
    py::dict out;
    out["phase"] = phase;
    out["stall"] = stall;
    out["assemble"] = seconds(totals.assemble);
    out["produce_stall"] = seconds(totals.produce_stall);
    return out;
  }

  // The events of a trace as (phase, begin_ns, end_ns, pack, slot, stream or -1).
  py::list events() const {
    py::list out;
    for (const uml::TraceEvent& e : loader.events()) {
      out.append(
          py::make_tuple(kPhaseNames[e.phase], e.begin_ns, e.end_ns, e.pack, e.slot, e.stream));
    }
    return out;
  }

  // (offset, bytes) of each array of a layout: raw rows per region, then the arrays that describe
  // them.
  std::vector<std::pair<size_t, size_t>> fields(int layout) {
    const uml::SlotMap& map = loader.map(layout);
    std::vector<std::pair<size_t, size_t>> out;
    for (const uml::Field& f : map.raw) out.emplace_back(f.offset, f.bytes);
    for (const uml::Field* f :
         {&map.offsets, &map.modality, &map.label, &map.sample, &map.position, &map.segment}) {
      out.emplace_back(f->offset, f->bytes);
    }
    return out;
  }
};

std::vector<uml::SourceSpec> source_specs(const std::vector<StreamArgs>& streams,
                                          const std::vector<SourceArgs>& sources) {
  if (streams.size() != sources.size()) {
    throw std::invalid_argument("a loader needs one source per stream");
  }
  std::vector<uml::SourceSpec> specs;
  for (size_t i = 0; i < sources.size(); ++i) {
    const auto& [rows, row_bytes, labels] = sources[i];
    const Offsets& offsets = std::get<1>(streams[i]);
    const auto total = static_cast<size_t>(offsets.at(offsets.size() - 1));
    const auto bytes = static_cast<size_t>(rows.size());
    if (row_bytes == 0 || (bytes != 0 && bytes != total * row_bytes)) {
      throw std::invalid_argument("a source's bytes are not a whole number of rows");
    }
    specs.push_back({bytes ? reinterpret_cast<const std::byte*>(rows.data()) : nullptr,
                     row_bytes,
                     {offsets.data(), static_cast<size_t>(offsets.size())},
                     {labels.data(), static_cast<size_t>(labels.size())}});
  }
  return specs;
}

}  // namespace

void bind_loader(py::module_& m) {
  m.def("hash64", &uml::hash64, py::arg("seed"), py::arg("stream"), py::arg("epoch"),
        py::arg("index"));

  py::class_<uml::Device, std::shared_ptr<uml::Device>>(m, "Device");
  py::class_<uml::HostDevice, uml::Device, std::shared_ptr<uml::HostDevice>>(m, "HostDevice")
      .def(py::init<>());

  py::class_<uml::Job>(m, "Job")
      .def_readonly("pack", &uml::Job::pack)
      .def_readonly("slot", &uml::Job::slot);

  py::class_<BoundPlanner>(m, "Planner")
      .def(py::init([](std::vector<StreamArgs> streams, const std::vector<LayoutArgs>& layouts,
                       const std::string& policy, std::vector<int> first_side, double warmup_epochs,
                       uint64_t seed, int rank, int world) {
             uml::PlannerSpec spec = planner_spec(streams, layouts, policy, std::move(first_side),
                                                  warmup_epochs, seed, rank, world);
             return std::unique_ptr<BoundPlanner>(
                 new BoundPlanner{std::move(streams), uml::Planner(std::move(spec)), {}});
           }),
           py::arg("streams"), py::arg("layouts"), py::arg("policy"), py::arg("first_side"),
           py::arg("warmup_epochs"), py::arg("seed"), py::arg("rank"), py::arg("world"))
      .def("next", &BoundPlanner::next)
      .def("save", &BoundPlanner::save)
      .def("load",
           [](BoundPlanner& self, const Offsets& state, const std::vector<DealArgs>& deals) {
             self.planner.load({state.data(), static_cast<size_t>(state.size())}, deals_of(deals));
           });

  py::class_<BoundLoader>(m, "Loader")
      .def(py::init([](std::vector<StreamArgs> streams, std::vector<SourceArgs> sources,
                       const std::vector<LayoutArgs>& layouts, const std::string& policy,
                       std::vector<int> first_side, double warmup_epochs, uint64_t seed, int rank,
                       int world, std::shared_ptr<uml::Device> device, int slots, int threads,
                       int64_t job_bytes) {
             uml::PlannerSpec spec = planner_spec(streams, layouts, policy, std::move(first_side),
                                                  warmup_epochs, seed, rank, world);
             std::vector<uml::SourceSpec> specs = source_specs(streams, sources);
             return std::unique_ptr<BoundLoader>(
                 new BoundLoader{std::move(streams), std::move(sources),
                                 uml::Loader(std::move(spec), std::move(specs), std::move(device),
                                             slots, threads, job_bytes)});
           }),
           py::arg("streams"), py::arg("sources"), py::arg("layouts"), py::arg("policy"),
           py::arg("first_side"), py::arg("warmup_epochs"), py::arg("seed"), py::arg("rank"),
           py::arg("world"), py::arg("device"), py::arg("slots"), py::arg("threads"),
           py::arg("job_bytes"))
      .def(
          "acquire",
          [](BoundLoader& self, double wait_s, uintptr_t stream) {
            // A pack that is ready is taken without giving up the GIL, which a reader might keep
            // for 5 ms, Python's switch interval.
            const auto slot = self.loader.acquire(0.0, reinterpret_cast<uml::Stream>(stream));
            if (slot) return slot;
            py::gil_scoped_release nogil;
            return self.loader.acquire(wait_s, reinterpret_cast<uml::Stream>(stream));
          },
          py::arg("wait_s"), py::arg("stream") = 0)
      .def(
          "release",
          [](BoundLoader& self, int slot, uintptr_t stream) {
            self.loader.release(slot, reinterpret_cast<uml::Stream>(stream));
          },
          py::arg("slot"), py::arg("stream") = 0)
      .def(
          "close", [](BoundLoader& self) { self.loader.close(); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "drain", [](BoundLoader& self, double wait_s) { return self.loader.drain(wait_s); },
          py::arg("wait_s"), py::call_guard<py::gil_scoped_release>())
      .def("load",
           [](BoundLoader& self, const Offsets& state, const std::vector<DealArgs>& args) {
             std::vector<uml::Deal> deals = deals_of(args);
             py::gil_scoped_release nogil;
             self.loader.load({state.data(), static_cast<size_t>(state.size())}, std::move(deals));
           })
      .def("layout", [](BoundLoader& self, int slot) { return self.loader.layout(slot); })
      .def("save",
           [](BoundLoader& self, py::array_t<int64_t>& out) { self.loader.save(span_of(out)); })
      .def("copy_state",
           [](BoundLoader& self, int slot, py::array_t<int64_t>& out) {
             const std::span<const int64_t> state = self.loader.state(slot);
             std::copy_n(state.begin(), std::min(state.size(), span_of(out).size()),
                         out.mutable_data());
           })
      .def("take", &BoundLoader::take, py::arg("wait_s"))
      .def("finish",
           [](BoundLoader& self, const uml::Job& job, const std::vector<int64_t>& rejected) {
             py::gil_scoped_release nogil;
             self.loader.finish(job, rejected);
           })
      .def("fail",
           [](BoundLoader& self, const std::string& what) {
             py::gil_scoped_release nogil;
             self.loader.fail(what);
           })
      .def("ready", [](BoundLoader& self) { return self.loader.ready(); })
      .def("stage", [](BoundLoader& self) { return self.loader.stage(); })
      .def("totals", &BoundLoader::totals)
      .def("trace", [](BoundLoader& self, size_t capacity) { self.loader.trace(capacity); })
      .def("events", &BoundLoader::events)
      .def("memory", &BoundLoader::memory)
      .def("device_address",
           [](BoundLoader& self, int slot) {
             return reinterpret_cast<uintptr_t>(self.loader.memory()->block(slot).device);
           })
      .def("fields", &BoundLoader::fields);
}
