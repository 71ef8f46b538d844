// Order, epochs and state of the planner.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "core/planner.h"
#include "core/rng.h"
#include "ragged_data.h"

namespace uml {
namespace {

void hash_values_are_fixed() {
  // Saved checkpoints rely on these orders.
  static_assert(mix64(0) == 0);
  static_assert(hash64(0, 0, 0, 0) != hash64(1, 0, 0, 0));
  CHECK(mix64(kGolden) == 0xE220A8397B1DCDAFull);  // the first output of splitmix64 from seed 0
}

void no_sample_runs_ahead_of_another() {
  const RaggedData a(50, 1, 30, 4), b(17, 5, 40, 1);
  Planner planner(joint_spec(a, b, 120, 40));
  std::vector<int> seen(50, 0);
  PackPlan plan;
  int64_t rows[2] = {0, 0};
  for (int k = 0; k < 200; ++k) {
    planner.next(plan);
    for (int m = 0; m < 2; ++m) {
      const RaggedData& data = m == 0 ? a : b;
      int64_t packed = 0;
      for (int64_t i : plan.regions[m].samples) packed += data.offsets[i + 1] - data.offsets[i];
      CHECK(packed <= 120);
      rows[m] += packed;
    }
    for (int64_t i : plan.regions[0].samples) ++seen[i];
    const auto [least, most] = std::minmax_element(seen.begin(), seen.end());
    CHECK(*most - *least <= 1);
  }
  CHECK(std::abs(rows[0] - rows[1]) <= 40);
}

void a_restored_planner_continues() {
  const RaggedData a(50, 1, 30, 4), b(17, 5, 40, 1);
  Planner first(joint_spec(a, b, 120, 40)), second(joint_spec(a, b, 120, 40));
  PackPlan x, y;
  for (int k = 0; k < 37; ++k) first.next(x);
  std::vector<int64_t> state(first.state_size());
  first.save(state);
  second.load(state, {});
  for (int k = 0; k < 100; ++k) {
    first.next(x);
    second.next(y);
    CHECK(x.regions == y.regions);
  }
  state[7 + 8 + 1] = 50;  // the first sample of the window does not exist
  bool is_refused = false;
  try {
    second.load(state, {});
  } catch (const std::invalid_argument&) {
    is_refused = true;
  }
  CHECK(is_refused);
}

}  // namespace
}  // namespace uml

int main() {
  uml::hash_values_are_fixed();
  uml::no_sample_runs_ahead_of_another();
  uml::a_restored_planner_continues();
}
