#include "core/planner.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "core/rng.h"

namespace uml {
namespace {

int64_t padding_slots(int64_t rows, int64_t max_len) { return (rows + max_len - 1) / max_len; }

bool fits(int64_t rest, int64_t count, const RegionRule& rule) {
  return rest >= 0 && count + padding_slots(rest, rule.max_len) <= rule.slots;
}

}  // namespace

StreamQueue::StreamQueue(const StreamSpec& spec, uint64_t seed, int rank, int world)
    : spec_(spec), seed_(seed), rank_(rank), world_(world) {
  hashes_.resize(size());
  sorted_.resize(size());
  order_.reserve(size() / world + 1);
  seek(0, 0);
  refill();
}

int64_t StreamQueue::first(int64_t epoch) const {
  const int64_t before = epoch % world_ * (size() % world_) % world_;
  return (rank_ - before + world_) % world_;
}

void StreamQueue::seek(int64_t epoch, int64_t cursor) {
  epoch_ = epoch;
  cursor_ = cursor;
  if (epoch == deal_.through) {
    order_ = deal_.samples;
    return;
  }
  deal_ = {};
  for (int64_t i = 0; i < size(); ++i) hashes_[i] = hash64(seed_, spec_.key, epoch, i);
  std::iota(sorted_.begin(), sorted_.end(), 0);
  std::sort(sorted_.begin(), sorted_.end(), [this](int64_t a, int64_t b) {
    return std::pair(hashes_[a], a) < std::pair(hashes_[b], b);
  });
  order_.clear();
  for (int64_t i = first(epoch); i < size(); i += world_) order_.push_back(sorted_[i]);
}

void StreamQueue::refill() {
  while (held_ < kWindow) {
    if (cursor_ == static_cast<int64_t>(order_.size())) seek(epoch_ + 1, 0);
    const int64_t epoch = epoch_ == deal_.through ? deal_.epochs[cursor_] : epoch_;
    const int64_t sample = order_[cursor_++];
    window_[held_++] = {epoch, sample, length(sample)};
  }
}

void StreamQueue::take(int position, Picks& picks) {
  const Entry taken = window_[position];
  std::move(window_.begin() + position + 1, window_.begin() + held_, window_.begin() + position);
  --held_;
  phase_rows_ += taken.length;
  rows_ += taken.length;
  ++samples_;
  picks.samples.push_back(taken.sample);
  picks.epochs.push_back(taken.epoch);
  refill();
}

StreamQueue::Group StreamQueue::best_group(int64_t rem, int64_t room, int64_t count,
                                           const RegionRule& rule) const {
  Group choice;
  int64_t best = std::abs(rem);
  if (best == 0) return choice;
  int head = 0;
  while (head < kWindow && window_[head].epoch == window_[0].epoch) ++head;
  for (int i = 0; i < head; ++i) {
    const int64_t n = window_[i].length;
    const int64_t cost = std::abs(rem - n);
    if (cost < best && fits(room - n, count + 1, rule)) {
      best = cost;
      choice = {1, {i, 0}};
    }
  }
  if (choice.count == 1 && best <= rule.close) return choice;
  for (int i = 0; i < head && best > 0; ++i) {
    for (int j = i + 1; j < head; ++j) {
      const int64_t n = window_[i].length + window_[j].length;
      const int64_t cost = std::abs(rem - n);
      if (cost < best && fits(room - n, count + 2, rule)) {
        best = cost;
        choice = {2, {i, j}};
      }
    }
  }
  return choice;
}

void StreamQueue::fill(int64_t target, const RegionRule& rule, Picks& picks) {
  int64_t taken = 0;
  for (;;) {
    const int64_t rem = target - taken;
    const int64_t room = rule.rows - taken;
    const int64_t n = window_[0].length;
    const int64_t count = static_cast<int64_t>(picks.samples.size());
    Group group{1, {0, 0}};
    const bool helps = rem - n >= rule.reserve || (count == 0 && std::abs(rem - n) < std::abs(rem));
    if (!helps || !fits(room - n, count + 1, rule)) group = best_group(rem, room, count, rule);
    if (group.count == 0) return;
    for (int k = 0; k < group.count; ++k) {
      const int position = group.position[k] - k;
      taken += window_[position].length;
      take(position, picks);
    }
  }
}

void StreamQueue::save(std::span<int64_t> state) const {
  const int64_t head[] = {static_cast<int64_t>(spec_.key),
                          size(),
                          spec_.offsets.back() - spec_.offsets.front(),
                          epoch_,
                          cursor_,
                          phase_rows_,
                          samples_,
                          rows_};
  auto out = std::copy(std::begin(head), std::end(head), state.begin());
  for (const Entry& entry : window_) {
    *out++ = entry.epoch;
    *out++ = entry.sample;
  }
}

void StreamQueue::load(std::span<const int64_t> state, Deal deal) {
  const int64_t part = state[3] == deal.through ? static_cast<int64_t>(deal.samples.size())
                                                : (size() - first(state[3]) + world_ - 1) / world_;
  bool ok = state[0] == static_cast<int64_t>(spec_.key) && state[1] == size() && state[3] >= 0 &&
            state[4] >= 0 && state[4] <= part && deal.epochs.size() == deal.samples.size();
  const auto exists = [this](int64_t sample) { return sample >= 0 && sample < size(); };
  for (int k = 0; k < kWindow; ++k) ok = ok && exists(state[8 + 2 * k + 1]);
  ok = ok && std::all_of(deal.samples.begin(), deal.samples.end(), exists);
  if (!ok) throw std::invalid_argument("the planner state does not belong to these streams");
  deal_ = std::move(deal);
  seek(state[3], state[4]);
  phase_rows_ = state[5];
  samples_ = state[6];
  rows_ = state[7];
  for (int k = 0; k < kWindow; ++k) {
    const int64_t sample = state[8 + 2 * k + 1];
    window_[k] = {state[8 + 2 * k], sample, length(sample)};
  }
}

Planner::Planner(PlannerSpec spec) : spec_(std::move(spec)), is_warm_(!spec_.first_side.empty()) {
  for (const LayoutRule& layout : spec_.layouts) {
    for (const RegionRule& r : layout.regions) {
      if (r.stream < 0 || r.stream >= static_cast<int>(spec_.streams.size())) {
        throw std::invalid_argument("a region names a stream that does not exist");
      }
    }
    if (layout.order.size() != layout.regions.size() || layout.pace <= 0) {
      throw std::invalid_argument("a layout needs an order of all its regions and a positive pace");
    }
  }
  if (spec_.layouts.empty()) throw std::invalid_argument("the planner needs a layout");
  for (const StreamSpec& stream : spec_.streams) {
    queues_.emplace_back(stream, spec_.seed, spec_.rank, spec_.world);
  }
}

bool Planner::first_side_done() const {
  return std::all_of(spec_.first_side.begin(), spec_.first_side.end(), [this](int i) {
    const StreamQueue& q = queues_[i];
    return static_cast<double>(q.samples() * spec_.world) >=
           spec_.warmup_epochs * static_cast<double>(q.size());
  });
}

int Planner::layout_index() const {
  if (spec_.policy != Policy::kAlternate) {
    return is_warm_ ? 0 : static_cast<int>(spec_.layouts.size()) - 1;
  }
  int behind = 0;
  for (int i = 1; i < static_cast<int>(queues_.size()); ++i) {
    if (queues_[i].progress() < queues_[behind].progress()) behind = i;
  }
  return behind;
}

void Planner::next(PackPlan& plan) {
  if (is_warm_ && first_side_done()) {
    is_warm_ = false;
    for (StreamQueue& q : queues_) q.start_phase();
  }
  plan.layout = layout_index();
  const LayoutRule& rule = spec_.layouts[plan.layout];
  if (plan.regions.size() < rule.regions.size()) plan.regions.resize(rule.regions.size());
  for (Picks& picks : plan.regions) {
    picks.samples.clear();
    picks.epochs.clear();
  }
  double reach = queues_[rule.regions[0].stream].progress();
  for (const RegionRule& r : rule.regions) reach = std::min(reach, queues_[r.stream].progress());
  for (bool is_empty = true; is_empty;) {
    reach += rule.pace;
    double ahead = reach;
    for (size_t k = 0; k < rule.order.size(); ++k) {
      const int m = rule.order[k];
      StreamQueue& q = queues_[rule.regions[m].stream];
      const int64_t target =
          static_cast<int64_t>(std::floor(ahead * q.share() + 0.5)) - q.phase_rows();
      q.fill(target, rule.regions[m], plan.regions[m]);
      if (k == 0) ahead = q.progress();
      is_empty = is_empty && plan.regions[m].samples.empty();
    }
  }
  ++packs_;
}

void Planner::save(std::span<int64_t> state) const {
  const int64_t head[kHeader] = {
      kFormat,          static_cast<int64_t>(spec_.seed),    spec_.rank, spec_.world, packs_,
      is_warm_ ? 1 : 0, static_cast<int64_t>(queues_.size())};
  std::copy(std::begin(head), std::end(head), state.begin());
  for (size_t i = 0; i < queues_.size(); ++i) {
    queues_[i].save(state.subspan(kHeader + i * StreamQueue::kStateSize, StreamQueue::kStateSize));
  }
}

void Planner::load(std::span<const int64_t> state, std::vector<Deal> deals) {
  if (deals.empty()) deals.resize(queues_.size());
  if (state.size() != state_size() || state[0] != kFormat ||
      state[6] != static_cast<int64_t>(queues_.size()) || deals.size() != queues_.size()) {
    throw std::invalid_argument("not a planner state of these streams");
  }
  for (size_t i = 0; i < queues_.size(); ++i) {
    queues_[i].load(state.subspan(kHeader + i * StreamQueue::kStateSize, StreamQueue::kStateSize),
                    std::move(deals[i]));
  }
  packs_ = state[4];
  is_warm_ = state[5] != 0;
}

}  // namespace uml
