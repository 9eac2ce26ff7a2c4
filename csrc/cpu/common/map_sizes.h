#pragma once

#include <cstdint>

namespace segattn::cpu {

struct MapSizes {
  std::int64_t height, width;
  std::int64_t positions() const { return height * width; }
};

}  // namespace segattn::cpu
