// Tile sizes and shared memory of the gradients of query and key on Hopper.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/math.h"
#include "cuda/position/params.h"

namespace segattn::cuda {

// kKeyChannels: 64 or 128, E rounded up; bulk copies fill with zeros.
template <class Element_, int kKeyChannels_, GradOutput kGradOutput_>
struct WgmmaQueryKeyGradientTraits {
  using Element = Element_;
  static constexpr int kKeyChannels = kKeyChannels_;
  static constexpr bool kKeepsGradOutput = kGradOutput_ == GradOutput::kResident;
  static constexpr int kQueries = 128, kKeys = 128;  // of a tile of the attention map
  static constexpr int kThreads = 384;               // a producer warpgroup and two consumers
  // Of the 168 a thread that the launch has. The accumulators are up to 160, with E = 128 192.
  static constexpr int kProducerRegisters = kKeyChannels == 64 ? 40 : 24;
  static constexpr int kConsumerRegisters = kKeyChannels == 64 ? 232 : 240;
  static constexpr int kWarpgroupQueries = 64;
  static constexpr int kChunk = 32;  // value channels of a stage
  static constexpr int kExponentialParts = 4;

  static_assert(kKeyChannels == 64 || kKeyChannels == 128);

  // A box of a bulk copy is [channels][64 positions]. A tile of 128 positions is two boxes.
  static constexpr int kRowBytes = 128;
  static constexpr int kTileBoxBytes = kKeyChannels * kRowBytes;
  static constexpr int kTileBytes = 2 * kTileBoxBytes;  // of query or key
  static constexpr int kChunkBoxBytes = kChunk * kRowBytes;
  static constexpr int kChunkBytes = 2 * kChunkBoxBytes;  // of value or grad_output
  // dS of a warpgroup: [64 keys of 128][64 queries][64 keys]
  static constexpr int kGradientBoxBytes = kWarpgroupQueries * kRowBytes;
  static constexpr int kGradientBytes = 2 * kGradientBoxBytes;
  // With one buffer, the second warpgroup stores its dS after it has read that of the first. E = 128 needs both at
  // once: grad_key's rows are computed 64 at a time, and each sum is over all queries of the tile.
  static constexpr int kGradientBuffers = kKeepsGradOutput ? 1 : 2;
  static constexpr int kKeySlots = 2;
  static constexpr int kStages = kKeepsGradOutput ? 4 : kKeyChannels == 64 ? 8 : 6;
  static constexpr int kStageBytes = kKeepsGradOutput ? kChunkBytes : 2 * kChunkBytes;  // grad_output, then value

  // At least kExponentialParts, beside whose products the exponentials are computed; past C they are zeros. A resident
  // chunk of the next query block is copied up to kStages chunks ahead, when its predecessor has been multiplied.
  static constexpr __host__ __device__ int chunks(int value_channels) {
    const int needed = ceil_div(value_channels, kChunk);
    return needed < kExponentialParts ? kExponentialParts : needed;
  }
  static_assert(!kKeepsGradOutput || kStages <= kExponentialParts);

  struct Barriers {
    uint64_t chunk_full[kStages], chunk_empty[kStages];
    uint64_t key_full[kKeySlots], key_empty[kKeySlots];
    uint64_t query_full, query_empty;
  };
  static_assert(sizeof(Barriers) % 16 == 0, "what follows is aligned to 16 bytes, to 1024 after at most 1008 more");

  static constexpr int kAlignment = 1024;  // of a box with 128-byte swizzle; dynamic shared memory has 16
  static constexpr __host__ __device__ int resident_bytes(int value_channels) {
    return kKeepsGradOutput ? chunks(value_channels) * kChunkBytes : 0;
  }
  static constexpr __host__ __device__ int shared_bytes(int value_channels) {
    return static_cast<int>(sizeof(Barriers)) + kAlignment - 16 + kTileBytes + kKeySlots * kTileBytes +
        kStages * kStageBytes + kGradientBuffers * kGradientBytes + resident_bytes(value_channels);
  }
};

}  // namespace segattn::cuda
