// The matrix products of a warpgroup that a block has in flight. Internal to the runtime.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "../include/emulated_wgmma.h"

namespace segattn::emulator {

constexpr int kWarpRows = 16;
constexpr int kTileColumns = 16;  // computed at once

struct SumTile {
  float rows[kWarpRows][kTileColumns];
};

// The registers that products of a warp accumulate into. While products are in flight the lanes' registers are NaN and
// the sums are here.
struct Accumulators {
  float* registers[kWarpSize];
  int tiles;
  std::vector<SumTile> sums;
  uint64_t last_product;
  bool delivered = false;  // since the last product
};

// A warp's part, 16 rows, of a product.
struct WarpProduct {
  WgmmaOperands operands;
  Site site;
  const uint32_t* a_registers[kWarpSize];
  const char* shared;  // the block's dynamic memory
  int first_row;
  std::shared_ptr<Accumulators> accumulators;
};

struct Group {
  uint64_t end;     // the number of the product after its last
  uint16_t number;  // trace::group_ended
};

// Products are numbered from 0 in the order in which the warp issues them.
struct WarpProducts {
  bool fenced = false;
  int object = -1;  // of the race detector
  uint64_t issued = 0;
  uint64_t committed = 0;
  uint64_t executed = 0;
  uint64_t finished = 0;                                    // waited for
  std::deque<WarpProduct> in_flight;                        // issued and not finished
  std::deque<Group> groups;                                 // committed and not finished
  std::vector<std::shared_ptr<Accumulators>> accumulators;  // of products in flight
};

// What the four warps of a warpgroup must issue alike; in its first warp.
struct WarpgroupLog {
  struct Entry {
    WgmmaOperands operands;
    Site site;
    int warp;
  };
  std::deque<Entry> entries;
  uint64_t first = 0;  // the number of the oldest entry
};

// The running thread leaves the kernel.
void check_products_finished();

}  // namespace segattn::emulator
