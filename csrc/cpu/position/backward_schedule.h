// How the backward pass of position attention is cut into work units without atomic sums and with every sum in a fixed
// order, whatever the number of threads.
//
// Keys are cut into groups, queries into groups; unit (key group, query group) adds to the gradients of both. In step t
// key group g meets query group (g + t) mod steps: units of one step touch different groups, and a group's units come
// one after another, so every sum has one order. A unit starts when the units before it in both groups are done; no
// barrier holds up threads that could go on, and the memory for sums does not grow with the number of threads.
//
// Where keys are so few that there are less than kParallelGroups key groups (ANN's 110 keys), the query groups are dealt
// to several replicas, each with sums of its own for grad_key and grad_value, which are added in order at the end.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace segattn::cpu {

struct Range {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Part `index` of `parts` nearly equal ones of [0, extent), cut at multiples of `unit`.
constexpr Range part_of(std::int64_t extent, std::int64_t unit, std::int64_t index, std::int64_t parts) {
  const std::int64_t units = divide_up(extent, unit);
  return {std::min(extent, index * units / parts * unit), std::min(extent, (index + 1) * units / parts * unit)};
}

// The cut of `samples` samples with n queries and m keys: a function of these sizes alone.
class PositionSchedule {
 public:
  struct Unit {
    std::int64_t step;
    std::int64_t keys;     // index of the key group's sums: (sample, replica, key group)
    std::int64_t queries;  // index of the query group's sums: (sample, query group)
    std::int64_t sample, replica, key_group, query_group;
    bool idle;  // the key group has no partner in this step: nothing to do, nobody waits for it
  };

  // shared_operands: nothing is packed for a unit by itself, so that key groups may be small.
  PositionSchedule(std::int64_t samples, std::int64_t n, std::int64_t m, bool shared_operands)
      : samples(samples),
        key_groups(m <= kOneGroup ? 1 : groups_for(m, shared_operands ? kSmallestGroup : kSmallestKeyGroup)),
        query_groups(groups_for(n, kSmallestGroup)),
        replicas(
            shared_operands && key_groups * samples >= kEnoughGroups
                ? 1
                : std::clamp<std::int64_t>(divide_up(kParallelGroups, key_groups * samples), 1, query_groups)),
        steps_(std::max(key_groups, divide_up(query_groups, replicas))),
        keys_done_(new std::atomic<std::int64_t>[samples * replicas * key_groups]()),
        queries_done_(new std::atomic<std::int64_t>[samples * query_groups]()) {}

  std::int64_t units() const { return steps_ * lanes(); }

  // Units in the order in which they have to be started.
  Unit unit(std::int64_t index) const {
    Unit unit{};
    unit.step = index / lanes();
    unit.keys = index % lanes();
    unit.key_group = unit.keys % key_groups;
    unit.replica = unit.keys / key_groups % replicas;
    unit.sample = unit.keys / key_groups / replicas;
    const Range partners = part_of(query_groups, 1, unit.replica, replicas);
    unit.query_group = partners.begin + (unit.key_group + unit.step) % steps_;
    unit.queries = unit.sample * query_groups + unit.query_group;
    unit.idle = unit.query_group >= partners.end;
    return unit;
  }

  // A unit's place among the units of its key group (and replica) and of its query group.
  struct Place {
    bool first_of_keys, last_of_keys, first_of_queries, last_of_queries;
  };

  // Waits for the units before this one (which is not idle) in its key group and its query group.
  Place wait(const Unit& unit) const {
    const Range partners = part_of(query_groups, 1, unit.replica, replicas);
    const auto keys_meet = [&](std::int64_t step) { return (unit.key_group + step) % steps_ < partners.size(); };
    const std::int64_t local = unit.query_group - partners.begin;
    const auto queries_meet = [&](std::int64_t step) { return (local - step + steps_) % steps_ < key_groups; };
    const std::int64_t keys_before = step_before(unit.step, keys_meet);
    const std::int64_t queries_before = step_before(unit.step, queries_meet);
    wait_for(keys_done_[unit.keys], keys_before + 1);
    wait_for(queries_done_[unit.queries], queries_before + 1);
    return {
        keys_before < 0, step_after(unit.step, keys_meet) == steps_, queries_before < 0,
        step_after(unit.step, queries_meet) == steps_};
  }

  void finish(const Unit& unit) const {
    keys_done_[unit.keys].store(unit.step + 1, std::memory_order_release);
    queries_done_[unit.queries].store(unit.step + 1, std::memory_order_release);
  }

  const std::int64_t samples, key_groups, query_groups, replicas;

  // Groups have about this many positions: packing then costs 1.6% of the products.
  static constexpr std::int64_t kGroup = 600;
  // grad_output is packed twice for every key group, so small maps are rather cut along the queries (N = 1024, C = 512,
  // one thread: 16.3 ms with key groups of 128, 14.4 ms with 256).
  static constexpr std::int64_t kSmallestKeyGroup = 256;
  static constexpr std::int64_t kSmallestGroup = 64;
  // So few keys stay together: a tile that has them all has the sums over keys as well.
  static constexpr std::int64_t kOneGroup = 128;
  static constexpr std::int64_t kParallelGroups = 8;
  // Small maps rather keep fewer threads busy than sum replicas.
  static constexpr std::int64_t kEnoughGroups = 4;

 private:
  static constexpr std::int64_t groups_for(std::int64_t extent, std::int64_t smallest) {
    return std::max(divide_up(extent, kGroup), std::min(kParallelGroups, divide_up(extent, smallest)));
  }

  std::int64_t lanes() const { return samples * replicas * key_groups; }

  // The last step before `step` in which `meet` holds, -1 without one; the first after it, steps_ without one.
  template <class Meet>
  static std::int64_t step_before(std::int64_t step, const Meet& meet) {
    do {
      --step;
    } while (step >= 0 && !meet(step));
    return step;
  }
  template <class Meet>
  std::int64_t step_after(std::int64_t step, const Meet& meet) const {
    do {
      ++step;
    } while (step < steps_ && !meet(step));
    return step;
  }

  static void wait_for(const std::atomic<std::int64_t>& done, std::int64_t least) {
    while (done.load(std::memory_order_acquire) < least) {
      std::this_thread::yield();
    }
  }

  const std::int64_t steps_;
  const std::unique_ptr<std::atomic<std::int64_t>[]> keys_done_, queries_done_;
};

}  // namespace segattn::cpu
