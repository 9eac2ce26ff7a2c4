// Ranges of positions or channels, and the cut of an extent into nearly equal parts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/common/math.h"

namespace segattn::cpu {

// [begin, end)
struct Range {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

// Part `index` of `parts` nearly equal parts of [0, extent), cut at multiples of `unit`.
constexpr Range part_of(std::int64_t extent, std::int64_t unit, std::int64_t index, std::int64_t parts) {
  const std::int64_t units = ceil_div(extent, unit);
  return {std::min(extent, index * units / parts * unit), std::min(extent, (index + 1) * units / parts * unit)};
}

}  // namespace segattn::cpu
