// The shape of a weighted-sum block on Hopper (wgmma/weighted_sum.cuh): tiles, stages, shared memory.
#pragma once

namespace segattn::cuda {

// kChannels: 128 or 256 of the output. kKeyChannels: E rounded up to 64 or 128; copies fill the rest with zeros.
// kCluster: 1, or 2 blocks with neighbouring owned tiles, each of which copies half of the streamed and value tiles to
// both.
template <class Element_, int kChannels_, int kKeyChannels_, int kCluster_>
struct WgmmaWeightedSumTraits {
  using Element = Element_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kKeyChannels = kKeyChannels_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kConsumers = 2;       // warpgroups that multiply
  static constexpr int kConsumerOwned = 64;  // positions of each
  static constexpr int kOwned = kConsumers * kConsumerOwned;
  static constexpr int kStreamed = 64;  // positions of a step
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kConsumerWarps = 4 * kConsumers;
  // Of 65,536: 24 * 128 + 240 * 256 = 64,512.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  // Channels of the boxes of the streamed and value tiles: a block's half in a cluster.
  static constexpr int kStreamedBox = kKeyChannels / kCluster;
  static constexpr int kValueBox = kChannels / kCluster;

  // Every tile has rows of 128 bytes, 64 positions of one channel, with 128-byte swizzle, and starts on 1024 bytes.
  static constexpr int kRowBytes = 128;
  static constexpr int kOwnedBytes = kKeyChannels * kRowBytes;  // of each consumer
  static constexpr int kStreamedBytes = kKeyChannels * kRowBytes;
  static constexpr int kValueBytes = kChannels * kRowBytes;
  static constexpr int kStageBytes = kStreamedBytes + kValueBytes;
  static constexpr int kStatisticBytes = kStreamed * 4;  // of a stage: the logsumexp of the streamed positions
  static constexpr int kStages = kChannels == 256 ? (kKeyChannels == 64 ? 5 : 4) : (kKeyChannels == 64 ? 8 : 6);
  static constexpr int kBarriers = 1 + 3 * kStages;

  // Offsets in shared memory.
  static constexpr int kStagesOffset = kConsumers * kOwnedBytes;
  static constexpr int kStatisticsOffset = kStagesOffset + kStages * kStageBytes;
  static constexpr int kBarriersOffset = kStatisticsOffset + kStages * kStatisticBytes;
  static constexpr int kTileAlignment = 1024;  // of the start; dynamic shared memory is aligned to 16
  static constexpr int kSharedBytes = kBarriersOffset + 8 * kBarriers + kTileAlignment - 16;
  static constexpr int kSharedLimit = 227 * 1024;

  // 16-bit results pass through shared memory in rows of kOutputPitch elements, which start four banks apart.
  static constexpr int kOutputPitch = kOwned + 8;

  static_assert(sizeof(Element) == 2);
  static_assert(kChannels == 128 || kChannels == 256, "the columns of one wgmma");
  static_assert(kKeyChannels == 64 || kKeyChannels == 128);
  static_assert(kCluster == 1 || kCluster == 2);
  static_assert(kSharedBytes <= kSharedLimit);
  static_assert(kChannels * kOutputPitch * 2 <= kStatisticsOffset, "the results take the place of the tiles");
};

}  // namespace segattn::cuda
