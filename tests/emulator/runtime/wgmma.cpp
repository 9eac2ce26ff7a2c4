// wgmma. Each warp of a warpgroup computes its own 16 rows, and nothing but the kernel's barriers orders the warps: the
// hardware promises no more.
#include "wgmma.h"

#include <algorithm>
#include <cstring>

#include "counters.h"
#include "device.h"
#include "execution.h"
#include "mma_sum.h"
#include "trace.h"
#include "wgmma_layout.h"

namespace segattn::emulator {
namespace {

constexpr int kWarpsPerGroup = 4;
constexpr int kRows = 64;
constexpr const char* kFence = "wgmma.fence";
constexpr const char* kCommit = "wgmma.commit_group";
constexpr const char* kWait = "wgmma.wait_group";
constexpr const char* kProduct = "wgmma.mma_async";

void check_operand(
    const char* name, uint64_t descriptor, bool mn_major, int outer_size, size_t shared_bytes, Site site) {
  const Layout layout(descriptor, mn_major);
  const std::string where = describe(site);
  if (descriptor >> 62 != 1)
    fail("%s (%s): the descriptor of %s has no 128-byte swizzle", kProduct, where.c_str(), name);
  if ((descriptor >> 49 & 7) != 0)
    fail("%s (%s): the descriptor of %s has a base offset", kProduct, where.c_str(), name);
  // K-major tiles start in the first row of an atom, possibly further along the contraction.
  const uint32_t inside_atom = layout.start % kAtomBytes;
  if (mn_major ? inside_atom != 0 : inside_atom > 96 || inside_atom % 32 != 0) {
    fail(
        "%s (%s): the %s operand %s starts at byte %u of shared memory, which is %u past a multiple of %d", kProduct,
        where.c_str(), mn_major ? "MN-major" : "K-major", name, layout.start, inside_atom, kAtomBytes);
  }
  const bool several_chunks = mn_major && outer_size > kChunkElements;
  if (layout.stride == 0 || layout.stride % kAtomBytes != 0 ||
      (several_chunks && (layout.leading == 0 || layout.leading % kAtomBytes != 0))) {
    fail(
        "%s (%s): groups of %s are %u bytes apart and chunks %u, but the swizzle needs multiples of %d", kProduct,
        where.c_str(), name, layout.stride, layout.leading, kAtomBytes);
  }
  const uint64_t groups = (mn_major ? kDepth : outer_size) / 8;
  const uint64_t chunks = mn_major ? outer_size / kChunkElements : 1;
  const uint64_t end =
      layout.start - inside_atom + (groups - 1) * layout.stride + (chunks - 1) * layout.leading + kAtomBytes;
  if (end > shared_bytes) {
    fail(
        "%s (%s): the operand %s ends at byte %llu, outside the %zu bytes of shared memory", kProduct, where.c_str(),
        name, static_cast<unsigned long long>(end), shared_bytes);
  }
}

// The operands that all threads of a warpgroup have in common.
bool alike(const WgmmaOperands& x, const WgmmaOperands& y) {
  return x.type == y.type && x.tiles == y.tiles && (x.a_registers == nullptr) == (y.a_registers == nullptr) &&
      x.a == y.a && x.b == y.b && x.a_mn_major == y.a_mn_major && x.b_mn_major == y.b_mn_major &&
      x.accumulates == y.accumulates;
}

struct Issue {
  WgmmaOperands operands;
  Site site;
};

// The first warp of the running thread's warpgroup.
int first_of_warpgroup() {
  const int first = block_of(self()).first_warp;
  return first + (self().warp - first) / kWarpsPerGroup * kWarpsPerGroup;
}
// For messages: warps count in their block.
int in_block(int warp) {
  return warp - block_of(self()).first_warp;
}

// Compares the warp's next product with that of the other warps of its warpgroup.
void check_warpgroup(const WgmmaOperands& operands, const Site& site, uint64_t number) {
  const int warp = self().warp, first_warp = first_of_warpgroup();
  WarpgroupLog& log = warp_at(first_warp).warpgroup_log;
  const uint64_t index = number - log.first;
  if (index == log.entries.size()) {
    log.entries.push_back({operands, site, warp});
  } else {
    const WarpgroupLog::Entry& other = log.entries[index];
    if (!same_location(other.site, site)) {
      fail(
          "divergent warpgroup: warp %d is at %s (%s), but warp %d of the same warpgroup executed %s (%s)",
          in_block(warp), kProduct, describe(site).c_str(), in_block(other.warp), kProduct,
          describe(other.site).c_str());
    }
    if (!alike(other.operands, operands)) {
      fail(
          "divergent warpgroup: warp %d is at %s (%s) with other descriptors or operands than warp %d", in_block(warp),
          kProduct, describe(site).c_str(), in_block(other.warp));
    }
  }
  uint64_t passed = number + 1;
  for (int w = first_warp; w < first_warp + kWarpsPerGroup; ++w)
    passed = std::min(passed, w == warp ? number + 1 : warp_at(w).products.issued);
  for (; log.first < passed; ++log.first)
    log.entries.pop_front();
}

template <class F>
void for_accumulators(int tiles, F&& body) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int row = lane / 4, pair = lane % 4 * 2;
    for (int j = 0; j < tiles; ++j) {
      for (int i = 0; i < 4; ++i)
        body(lane, 4 * j + i, row + i / 2 * 8, 8 * j + pair + i % 2);
    }
  }
}

std::shared_ptr<Accumulators> find_accumulators(WarpProducts& products, void* const* issues) {
  const WgmmaOperands& mine = static_cast<const Issue*>(issues[0])->operands;
  for (const auto& found : products.accumulators) {
    if (found->tiles == mine.tiles && found->registers[0] == mine.d)
      return found;
    if (mine.d < found->registers[0] + 4 * found->tiles && found->registers[0] < mine.d + 4 * mine.tiles) {
      fail(
          "%s (%s): 64 x %d accumulators overlap the 64 x %d of a product that was not waited for", kProduct,
          describe(static_cast<const Issue*>(issues[0])->site).c_str(), 8 * mine.tiles, 8 * found->tiles);
    }
  }
  auto fresh = std::make_shared<Accumulators>();
  fresh->tiles = mine.tiles;
  fresh->sums.resize(8 * mine.tiles / kTileColumns);
  for (int lane = 0; lane < kWarpSize; ++lane)
    fresh->registers[lane] = static_cast<const Issue*>(issues[lane])->operands.d;
  for_accumulators(mine.tiles, [&](int lane, int i, int row, int column) {
    fresh->sums[column / kTileColumns].rows[row][column % kTileColumns] = fresh->registers[lane][i];
  });
  products.accumulators.push_back(fresh);
  return fresh;
}

size_t accumulator_bytes(int tiles) {
  return sizeof(float) * 4 * size_t(tiles);
}

void poison_registers(const Accumulators& accumulators) {
  for (float* registers : accumulators.registers)
    poison(registers, accumulator_bytes(accumulators.tiles));
}

void deliver(Accumulators& accumulators) {
  accumulators.delivered = true;
  for_accumulators(accumulators.tiles, [&](int lane, int i, int row, int column) {
    accumulators.registers[lane][i] = accumulators.sums[column / kTileColumns].rows[row][column % kTileColumns];
  });
}

// What a warp's part of a product reads: body(offset, bytes).
template <class F>
void for_shared_operands(const WarpProduct& product, F&& body) {
  const WgmmaOperands& operands = product.operands;
  if (operands.a_registers == nullptr)
    for_operand_bytes(Layout(operands.a, operands.a_mn_major), product.first_row, kWarpRows, body);
  for_operand_bytes(Layout(operands.b, operands.b_mn_major), 0, 8 * operands.tiles, body);
}

void execute(const WarpProduct& product) {
  const WgmmaOperands& operands = product.operands;
  const MmaType type = operands.type;
  MmaOperands<kDepth, kTileColumns> factors;
  float a[kWarpRows][kDepth];
  if (operands.a_registers != nullptr) {
    read_registers(type, product.a_registers, a);
  } else {
    read_operand<kWarpRows>(
        type, product.shared, Layout(operands.a, operands.a_mn_major), product.first_row,
        [&](int row, int k) -> float& { return a[row][k]; });
  }
  const Layout layout(operands.b, operands.b_mn_major);
  const int lowest_exponent = type == MmaType::kFloat16 ? kLowestExponentFloat16 : kLowestExponent;
  for (int tile = 0; tile < 8 * operands.tiles / kTileColumns; ++tile) {
    SumTile& sums = product.accumulators->sums[tile];
    if (!operands.accumulates)
      std::memset(&sums, 0, sizeof sums);
    std::memcpy(factors.a, a, sizeof a);
    read_operand<kTileColumns>(
        type, product.shared, layout, tile * kTileColumns, [&](int n, int k) -> float& { return factors.b[k][n]; });
    if (mma_rounding() == MmaRounding::kTruncate) {
      add_products_truncated(sums.rows, factors, lowest_exponent, mma_blocks(kDepth));
    } else {
      add_products_to_nearest(sums.rows, factors);
    }
  }
}

// Up to the product before `end`.
void execute_until(WarpProducts& products, uint64_t end) {
  for (; products.executed < end; ++products.executed)
    execute(products.in_flight[products.executed - products.finished]);
}

// The asynchronous unit executes products in order, and accumulators that no further product awaits are complete.
void execute_early(WarpProducts& products, uint64_t end) {
  execute_until(products, end);
  for (const auto& accumulators : products.accumulators) {
    if (accumulators->last_product < products.executed && !accumulators->delivered)
      deliver(*accumulators);
  }
}

void count(const WarpProduct& product) {
  const WgmmaOperands& operands = product.operands;
  counters.wgmma_operations[int(operands.type)] += int64_t(kWarpRows) * 8 * operands.tiles * kDepth;
  if (operands.a_registers == nullptr)
    counters.wgmma_a_bytes += kWarpRows * kDepth * kElementBytes;
  if (product.first_row == 0)  // the four warps read b together
    counters.wgmma_b_bytes += 8 * operands.tiles * kDepth * kElementBytes;
}

constexpr size_t kABytes = 4 * sizeof(uint32_t);

void trace_start(const WarpProduct& product, bool again, int object) {
  const int first_thread = self().warp * kWarpSize;
  const void* location = location_of(product.site);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (product.operands.a_registers != nullptr) {
      trace::registers_started(false, product.a_registers[lane], kABytes, first_thread + lane, location, false);
    }
    trace::registers_started(
        true, product.accumulators->registers[lane], accumulator_bytes(product.operands.tiles), first_thread + lane,
        location, again);
  }
  for_shared_operands(product, [&](uint32_t offset, int bytes) {
    trace::product_started(product.shared + offset, size_t(bytes), object, location);
  });
}

void trace_finish(const WarpProduct& product) {
  if (product.operands.a_registers != nullptr) {
    for (const uint32_t* a : product.a_registers)
      trace::registers_finished(a, kABytes);
  }
  for_shared_operands(
      product, [&](uint32_t offset, int bytes) { trace::product_finished(product.shared + offset, size_t(bytes)); });
}

void run_issue(void* const* issues, unsigned lanes) {
  const auto& [operands, site] = *static_cast<const Issue*>(issues[0]);
  for (int lane = 1; lane < kWarpSize; ++lane) {
    if (!alike(operands, static_cast<const Issue*>(issues[lane])->operands)) {
      fail(
          "%s (%s): lanes 0 and %d of warp %d have different descriptors or operands", kProduct, describe(site).c_str(),
          lane, in_block(self().warp));
    }
  }
  const int first_warp = first_of_warpgroup();
  if (in_block(first_warp) + kWarpsPerGroup > block_of(self()).warp_count) {
    fail(
        "%s (%s): the warpgroup of warp %d has fewer than 128 threads", kProduct, describe(site).c_str(),
        in_block(self().warp));
  }
  WarpProducts& products = warp_at(self().warp).products;
  if (!products.fenced)
    fail("%s (%s): needs a %s before the first product", kProduct, describe(site).c_str(), kFence);
  check_warpgroup(operands, site, products.issued);
  const size_t shared_bytes = counters.dynamic_shared_bytes;
  if (operands.a_registers == nullptr)
    check_operand("a", operands.a, operands.a_mn_major, kRows, shared_bytes, site);
  check_operand("b", operands.b, operands.b_mn_major, 8 * operands.tiles, shared_bytes, site);

  WarpProduct product{operands,
                      site,
                      {},
                      static_cast<const char*>(self().block->dynamic_shared),
                      (self().warp - first_warp) * kWarpRows,
                      nullptr};
  for (int lane = 0; lane < kWarpSize; ++lane)
    product.a_registers[lane] = static_cast<const Issue*>(issues[lane])->operands.a_registers;
  const size_t known = products.accumulators.size();
  product.accumulators = find_accumulators(products, issues);
  product.accumulators->last_product = products.issued;
  if constexpr (kTrace)
    trace_start(product, products.accumulators.size() == known, products.object);
  poison_registers(*product.accumulators);
  product.accumulators->delivered = false;
  count(product);
  products.in_flight.push_back(std::move(product));
  const uint64_t end = ++products.issued;
  start_async([&products, end] { execute_early(products, end); });
  if constexpr (kTrace)
    trace::warp_converged(self().warp, lanes);
}

void run_fence(void* const*, unsigned lanes) {
  WarpProducts& products = warp_at(self().warp).products;
  products.fenced = true;
  block_of(self()).has_products = true;
  if constexpr (kTrace) {
    if (products.object < 0)
      products.object = trace::add_object("a product");
    for (int lane = 0; lane < kWarpSize; ++lane)
      trace::registers_fenced(self().warp * kWarpSize + lane);
    trace::warp_converged(self().warp, lanes);
  }
}

void run_commit(void* const*, unsigned lanes) {
  WarpProducts& products = warp_at(self().warp).products;
  Group group{products.issued, 0};
  if constexpr (kTrace) {
    if (products.object >= 0)
      group.number = trace::group_ended(products.object);
  }
  products.groups.push_back(group);
  products.committed = products.issued;
  if constexpr (kTrace)
    trace::warp_converged(self().warp, lanes);
}

void run_wait(void* const* counts, unsigned lanes) {
  WarpProducts& products = warp_at(self().warp).products;
  const size_t groups_left = size_t(*static_cast<const int*>(counts[0]));
  while (products.groups.size() > groups_left) {
    const auto [end, number] = products.groups.front();
    products.groups.pop_front();
    if constexpr (kTrace) {
      for (int lane = 0; products.object >= 0 && lane < kWarpSize; ++lane)
        trace::group_waited(products.object, self().warp * kWarpSize + lane, number);
    }
    execute_until(products, end);
    for (; products.finished < end; ++products.finished) {
      if constexpr (kTrace)
        trace_finish(products.in_flight.front());
      products.in_flight.pop_front();
    }
    std::erase_if(products.accumulators, [&](const auto& accumulators) {
      if (accumulators->last_product >= end)
        return false;
      if (!accumulators->delivered)
        deliver(*accumulators);
      if constexpr (kTrace) {
        for (float* registers : accumulators->registers)
          trace::registers_finished(registers, accumulator_bytes(accumulators->tiles));
      }
      return true;
    });
  }
  if constexpr (kTrace)
    trace::warp_converged(self().warp, lanes);
}

void check_device(const char* operation, const Site& site) {
  if (device().architecture != 90)
    fail("%s (%s) needs sm_90a", operation, describe(site).c_str());
}

}  // namespace

uint64_t matrix_descriptor(const void* start, uint32_t chunk_bytes, uint32_t stride_bytes, Site site) {
  const ptrdiff_t offset = static_cast<const char*>(start) - static_cast<const char*>(self().block->dynamic_shared);
  if (offset < 0 || size_t(offset) >= counters.dynamic_shared_bytes) {
    fail(
        "matrix_descriptor (%s): %p is outside the block's dynamic shared memory", describe(site).c_str(),
        static_cast<const void*>(start));
  }
  if (offset % 16 != 0 || chunk_bytes % 16 != 0 || stride_bytes % 16 != 0) {
    fail(
        "matrix_descriptor (%s): offset %td, chunks %u bytes apart and groups %u bytes apart must be multiples of 16",
        describe(site).c_str(), offset, chunk_bytes, stride_bytes);
  }
  constexpr uint32_t kEnd = 1u << 18;
  if (chunk_bytes >= kEnd || stride_bytes >= kEnd) {
    fail(
        "matrix_descriptor (%s): chunks %u bytes apart and groups %u bytes apart do not fit 14 bits",
        describe(site).c_str(), chunk_bytes, stride_bytes);
  }
  return uint64_t(offset) >> 4 | uint64_t(chunk_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
      uint64_t(1) << 62;
}

void wgmma(const WgmmaOperands& operands, Site site) {
  check_device(kProduct, site);
  Issue mine{operands, site};
  collective({kProduct, true, true}, kFullMask, site, &mine, run_issue);
}

void wgmma_fence(Site site) {
  check_device(kFence, site);
  collective({kFence, true, true}, kFullMask, site, nullptr, run_fence);
}

void wgmma_commit(Site site) {
  check_device(kCommit, site);
  collective({kCommit, true, true}, kFullMask, site, nullptr, run_commit);
}

void wgmma_wait(int groups_left, Site site) {
  check_device(kWait, site);
  collective({kWait, true, true}, kFullMask, site, &groups_left, run_wait);
}

void fence_proxy_async(Site site) {
  check_device("fence.proxy.async", site);
  if constexpr (kTrace)
    trace::fenced_proxy();
}

void check_products_finished() {
  const int warp = self().warp;
  const WarpProducts& products = warp_at(warp).products;
  if (products.finished < products.issued) {
    fail(
        "leaves the kernel before it %s for the product at %s (%s)",
        products.committed < products.issued ? "committed and waited" : "waited", kProduct,
        describe(products.in_flight.back().site).c_str());
  }
  const Block& block = block_of(self());
  const int first_warp = first_of_warpgroup();
  const int end = std::min(first_warp + kWarpsPerGroup, block.first_warp + block.warp_count);
  for (int w = first_warp; w < end; ++w) {
    if (warp_at(w).alive == 0 && warp_at(w).products.issued != products.issued) {
      fail(
          "divergent warpgroup: warp %d leaves the kernel after %llu products, but warp %d executed %llu",
          in_block(warp), static_cast<unsigned long long>(products.issued), in_block(w),
          static_cast<unsigned long long>(warp_at(w).products.issued));
    }
  }
}

}  // namespace segattn::emulator
