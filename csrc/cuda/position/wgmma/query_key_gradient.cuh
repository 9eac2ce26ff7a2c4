// The gradients of query and key on Hopper: what query_key_gradient.cuh computes, with the same blocks and partials,
// with wgmma and bulk copies (docs/hopper.md).
//
// Warpgroup 0 copies. Warpgroups 1 and 2 multiply, each for 64 of the tile's 128 queries and all of its 128 keys:
//   1. the energies from the query and key tiles,
//   2. dP, contracted over C, with value and, unless it is resident, grad_output in chunks of 32 channels through a
//      ring. P = exp(energy - logsumexp) is computed beside the first products,
//   3. dS = P (dP - delta), rounded to 16 bits. From registers, grad_query (64 queries x E) += dS key^T,
//   4. grad_key^T (E x 128 keys) += query dS, with dS from shared memory. The second warpgroup computes it for both.
// The first one runs ahead of the second by as much as the ring and its dS buffer allow, so that the elementwise work
// of one runs beside the products of the other. If each computed grad_key for half of the keys, both would have to meet
// in every tile, and two dS buffers do not fit beside grad_output of C = 512.
//
// Rows of the energies, of dP and of grad_query are queries: thread t of a warpgroup has rows 16 (t / 32) + g and + 8
// of them, g = lane / 4.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/math.h"
#include "cuda/common/ptx_sm90.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/position/wgmma/params.h"
#include "cuda/position/wgmma/query_key_gradient_traits.cuh"

namespace segattn::cuda {

template <class Traits_, Keys kKeys>
struct WgmmaQueryKeyGradient {
  using Traits = Traits_;
  using Element = typename Traits::Element;
  using Barriers = typename Traits::Barriers;
  using RingPlaceOfChunk = RingPlace<Traits::kStages>;
  static constexpr ptx::MatrixMajor kK = ptx::MatrixMajor::kK, kMn = ptx::MatrixMajor::kMn;
  static constexpr int kStep = 16;                     // contraction of one wgmma
  static constexpr int kKeyTiles = Traits::kKeys / 8;  // accumulator tiles along the keys
  static constexpr int kChannelTiles = Traits::kKeyChannels / 8;
  static constexpr int kRowBlocks = Traits::kKeyChannels / 64;  // of grad_key
  static constexpr int kGroupBytes = 8 * Traits::kRowBytes;     // rows of a swizzled operand, in groups of 8
  static constexpr int kKeyStepBytes = 2 * kStep;               // 16 columns of a row
  static constexpr int kRowStepBytes = kStep * Traits::kRowBytes;
  static constexpr int kConsumerWarps = 8;

  // Named barriers; 0 is __syncthreads.
  enum : int { kGradientWritten = 1, kGradientRead = 2, kSecondWarpgroup = 3 };
  static constexpr int kBothWarpgroups = 256, kOneWarpgroup = 128;

  using Energies = float[kKeyTiles][4];                 // 64 queries x 128 keys: energies or P, dP
  using Gradient = uint32_t[Traits::kKeys / kStep][4];  // dS as the a operands of grad_query
  using QueryGradient = float[kChannelTiles][4];        // 64 queries x E
  using KeyGradient = float[kKeyTiles][4];              // 64 of E key channels x 128 keys

  const WgmmaQueryKeyGradientParams& maps;
  const QueryKeyGradientParams& p;
  unsigned char* query_shared;     // [64 queries of 128][E][64 queries]
  unsigned char* key_shared;       // [slot][64 keys of 128][E][64 keys]
  unsigned char* ring_shared;      // [stage], each chunk [64 positions of 128][32 channels][64 positions]
  unsigned char* gradient_shared;  // dS, [buffer][64 keys of 128][64 queries][64 keys]
  unsigned char* resident_shared;  // kKeepsGradOutput: grad_output of the query block, chunks as in the ring
  Barriers* barriers;
  int sample, group, range;
  int first_query_block, end_query_block, first_key_block, end_key_block;
  int chunks;

  __device__ __forceinline__ WgmmaQueryKeyGradient(const WgmmaQueryKeyGradientParams& params, unsigned char* shared)
      : maps(params), p(params.problem) {
    chunks = Traits::chunks(p.value_channels);
    barriers = reinterpret_cast<Barriers*>(shared);
    unsigned char* end = shared + sizeof(Barriers);
    query_shared = end + -reinterpret_cast<uintptr_t>(end) % Traits::kAlignment;
    key_shared = query_shared + Traits::kTileBytes;
    ring_shared = key_shared + Traits::kKeySlots * Traits::kTileBytes;
    gradient_shared = ring_shared + Traits::kStages * Traits::kStageBytes;
    resident_shared = gradient_shared + Traits::kGradientBuffers * Traits::kGradientBytes;

    // Blocks that run together share a query range, whose grad_output they read from L2 at about the same time.
    int block = static_cast<int>(blockIdx.x);
    group = block % p.groups;
    block /= p.groups;
    range = block % p.ranges;
    sample = block / p.ranges;
    first_query_block = range * p.blocks_per_range;
    end_query_block = min(first_query_block + p.blocks_per_range, p.query_blocks);
    first_key_block = group * p.blocks_per_group;
    end_key_block = min(first_key_block + p.blocks_per_group, p.key_blocks);
    if constexpr (kKeys == Keys::kKept) {
      // A group without kept keys still processes one block, past the end: it stores partials of 0.
      end_key_block = min(end_key_block, max(ceil_div(key_count(), Traits::kKeys), first_key_block + 1));
    }
  }

  __device__ __forceinline__ int key_count() const {
    if constexpr (kKeys == Keys::kKept) {
      return p.key_counts[sample];
    } else {
      return p.keys;
    }
  }

  // The place of a tile's keys, and the parities that consumers wait for.
  static __device__ __forceinline__ int key_slot(int tile) { return tile % Traits::kKeySlots; }
  static __device__ __forceinline__ uint32_t key_parity(int tile) { return tile / Traits::kKeySlots % 2; }
  __device__ __forceinline__ uint32_t query_parity(int query_block) const {
    return (query_block - first_query_block) % 2;
  }

  // By one thread.
  __device__ __forceinline__ void initialise_barriers() const {
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::mbarrier_init(&barriers->chunk_full[i], 1);
      ptx::mbarrier_init(&barriers->chunk_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Traits::kKeySlots; ++i) {
      ptx::mbarrier_init(&barriers->key_full[i], 1);
      ptx::mbarrier_init(&barriers->key_empty[i], kConsumerWarps);
    }
    ptx::mbarrier_init(&barriers->query_full, 1);
    ptx::mbarrier_init(&barriers->query_empty, kConsumerWarps);
    ptx::fence_barrier_init();
    ptx::prefetch_tensor_map(&maps.query);
    ptx::prefetch_tensor_map(&maps.key);
    ptx::prefetch_tensor_map(&maps.value);
    ptx::prefetch_tensor_map(&maps.grad_output);
  }

  // ---- the producer: two threads, of which neither waits for what the other copies ---------------------------------

  // The two boxes of 128 positions.
  __device__ __forceinline__ void copy_boxes(
      unsigned char* shared, int box_bytes, const CUtensorMap* map, int position, int channel,
      uint64_t* barrier) const {
    ptx::copy_box(shared, map, position, channel, sample, barrier);
    ptx::copy_box(shared + box_bytes, map, position + 64, channel, sample, barrier);
  }

  __device__ __forceinline__ void produce_chunks() const {
    RingPlaceOfChunk place;
    for (int query_block = first_query_block; query_block < end_query_block; ++query_block) {
      for (int key_block = first_key_block; key_block < end_key_block; ++key_block) {
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
          uint64_t* full = &barriers->chunk_full[place.stage];
          unsigned char* stage = ring_shared + place.stage * Traits::kStageBytes;
          ptx::mbarrier_wait(&barriers->chunk_empty[place.stage], place.parity ^ 1);
          const bool copies_grad_output = !Traits::kKeepsGradOutput || key_block == first_key_block;
          ptx::mbarrier_arrive_expect(full, copies_grad_output ? 2 * Traits::kChunkBytes : Traits::kChunkBytes);
          if (copies_grad_output) {
            copy_boxes(
                Traits::kKeepsGradOutput ? resident_shared + chunk * Traits::kChunkBytes : stage,
                Traits::kChunkBoxBytes, &maps.grad_output, query_block * Traits::kQueries, chunk * Traits::kChunk,
                full);
          }
          copy_boxes(
              stage + Traits::kStageBytes - Traits::kChunkBytes, Traits::kChunkBoxBytes, &maps.value,
              key_block * Traits::kKeys, chunk * Traits::kChunk, full);
          place.advance();
        }
      }
    }
  }

  __device__ __forceinline__ void produce_tiles() const {
    int tile = 0;
    for (int query_block = first_query_block; query_block < end_query_block; ++query_block) {
#pragma unroll 1
      for (int key_block = first_key_block; key_block < end_key_block; ++key_block) {
        uint64_t* full = &barriers->key_full[key_slot(tile)];
        ptx::mbarrier_wait(&barriers->key_empty[key_slot(tile)], key_parity(tile) ^ 1);
        ptx::mbarrier_arrive_expect(full, Traits::kTileBytes);
        copy_boxes(
            key_shared + key_slot(tile) * Traits::kTileBytes, Traits::kTileBoxBytes, &maps.key,
            key_block * Traits::kKeys, 0, full);
        ++tile;
        if (key_block == first_key_block) {
          ptx::mbarrier_wait(&barriers->query_empty, query_parity(query_block) ^ 1);
          ptx::mbarrier_arrive_expect(&barriers->query_full, Traits::kTileBytes);
          copy_boxes(
              query_shared, Traits::kTileBoxBytes, &maps.query, query_block * Traits::kQueries, 0,
              &barriers->query_full);
        }
      }
    }
  }

  // ---- the consumers ----------------------------------------------------------------------------------------------

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32 % 4; }  // of the warpgroup
  static __device__ __forceinline__ int first_row() { return 16 * warp() + lane() / 4; }

  // After this warp's last product that reads it.
  static __device__ __forceinline__ void release(uint64_t* empty) {
    if (lane() == 0) {
      ptx::mbarrier_arrive(empty);
    }
  }

  // Issues the energies of 64 queries and 128 keys: query^T key.
  static __device__ __forceinline__ void multiply_energies(
      Energies& energies, const unsigned char* query, const unsigned char* key) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kKeyChannels / kStep; ++step) {
      ptx::wgmma<Element, kMn, kMn>(
          energies, ptx::matrix_descriptor(query + step * kRowStepBytes, Traits::kTileBoxBytes, kGroupBytes),
          ptx::matrix_descriptor(key + step * kRowStepBytes, Traits::kTileBoxBytes, kGroupBytes), step > 0);
    }
    ptx::wgmma_commit();
  }

  // Issues dP of a chunk of channels: grad_output^T value.
  static __device__ __forceinline__ void multiply_chunk(
      Energies& weight_gradients, const unsigned char* grad_output, const unsigned char* value, bool accumulates) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kChunk / kStep; ++step) {
      ptx::wgmma<Element, kMn, kMn>(
          weight_gradients,
          ptx::matrix_descriptor(grad_output + step * kRowStepBytes, Traits::kChunkBoxBytes, kGroupBytes),
          ptx::matrix_descriptor(value + step * kRowStepBytes, Traits::kChunkBoxBytes, kGroupBytes),
          accumulates || step > 0);
    }
    ptx::wgmma_commit();
  }

  // Issues grad_query += dS key^T.
  static __device__ __forceinline__ void multiply_query_gradient(
      QueryGradient& grad_query, const Gradient& gradient, const unsigned char* key) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kKeys / kStep; ++step) {
      ptx::wgmma<Element, kK>(
          grad_query, gradient[step],
          ptx::matrix_descriptor(
              key + step / 4 * Traits::kTileBoxBytes + step % 4 * kKeyStepBytes, Traits::kTileBoxBytes, kGroupBytes),
          true);
    }
    ptx::wgmma_commit();
  }

  // Issues grad_key^T += query dS for 64 queries and the key channels of a row block.
  static __device__ __forceinline__ void multiply_key_gradient(
      KeyGradient& grad_key, const unsigned char* query, const unsigned char* gradient, int row_block) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kWarpgroupQueries / kStep; ++step) {
      ptx::wgmma<Element, kK, kMn>(
          grad_key,
          ptx::matrix_descriptor(
              query + row_block * 64 * Traits::kRowBytes + step * kKeyStepBytes, Traits::kTileBoxBytes, kGroupBytes),
          ptx::matrix_descriptor(gradient + step * kRowStepBytes, Traits::kGradientBoxBytes, kGroupBytes), true);
    }
    ptx::wgmma_commit();
  }

  // Turns a part of q.k into P, not yet masked.
  __device__ __forceinline__ void exponentials(Energies& energies, int part, const float (&logsumexp)[2]) const {
    constexpr int kTiles = kKeyTiles / Traits::kExponentialParts;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& energy = energies[part * kTiles + j][c];
        energy = ptx::exp2_approx(__fmaf_rn(energy, p.scale, -logsumexp[c / 2]) * kLog2E);
      }
    }
  }

  // dS, rounded. It is 0 for queries and keys past the end; computed, it can be NaN there: 0 times an infinite operand.
  __device__ __forceinline__ void energy_gradient(
      Gradient& gradient, Energies& weights, const Energies& weight_gradients, const float (&delta)[2],
      int queries_left, int keys_left) const {
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        weights[j][c] *= weight_gradients[j][c] - delta[c / 2];
      }
    }
    if (queries_left < Traits::kWarpgroupQueries || keys_left < Traits::kKeys) {
      const int rows_left = queries_left - first_row(), columns_left = keys_left - lane() % 4 * 2;
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (c / 2 * 8 >= rows_left || 8 * j + c % 2 >= columns_left) {
            weights[j][c] = 0.0f;
          }
        }
      }
    }
#pragma unroll
    for (int step = 0; step < Traits::kKeys / kStep; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&tile)[4] = weights[2 * step + i / 2];
        gradient[step][i] = packed_pair<Element>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
      }
    }
  }

  // Stores dS, [query][key], as wgmma's 128-byte swizzle has it. The eight rows of a store are in eight chunks of 16
  // bytes, so a warp's 32 words are in 32 banks.
  static __device__ __forceinline__ void store_gradient(unsigned char* buffer, const Gradient& gradient) {
    const int swizzle = lane() / 4;  // the row, modulo 8
    unsigned char* row = buffer + first_row() * Traits::kRowBytes + lane() % 4 * 4;
#pragma unroll
    for (int step = 0; step < Traits::kKeys / kStep; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int chunk = (2 * step + i / 2) % 8;
        *reinterpret_cast<uint32_t*>(
            row + step / 4 * Traits::kGradientBoxBytes + i % 2 * 8 * Traits::kRowBytes + ((chunk ^ swizzle) << 4)) =
            gradient[step][i];
      }
    }
    ptx::fence_proxy_async();
  }

  enum class Transfer { kLoad, kStore };

  // Moves grad_key's tile between registers and the block's partial in global memory. Only this thread accesses these
  // elements.
  template <Transfer kTransfer>
  __device__ __forceinline__ void move_grad_key(KeyGradient& grad_key, int key_block, int row_block) const {
    float* partial = p.grad_key_partials + (range * p.batch + sample) * p.key_channels * p.padded_keys +
        key_block * Traits::kKeys + lane() % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = 64 * row_block + first_row() + 8 * h;
      if (channel < p.key_channels) {
        float* address = partial + static_cast<int64_t>(channel) * p.padded_keys;
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j) {
          float(&tile)[4] = grad_key[j];
          if constexpr (kTransfer == Transfer::kStore) {
            *reinterpret_cast<float2*>(address + 8 * j) = make_float2(tile[2 * h], tile[2 * h + 1]);
          } else {
            const float2 pair = *reinterpret_cast<const float2*>(address + 8 * j);
            tile[2 * h] = pair.x;
            tile[2 * h + 1] = pair.y;
          }
        }
      }
    }
  }

  // The tile's sums so far. A partial starts at the block's first query block.
  __device__ __forceinline__ void start_grad_key(
      KeyGradient& grad_key, int query_block, int key_block, int row_block) const {
    clear(grad_key);
    if (query_block > first_query_block) {
      move_grad_key<Transfer::kLoad>(grad_key, key_block, row_block);
    }
  }

  __device__ __forceinline__ void store_grad_query(const QueryGradient& grad_query, int query) const {
    float* partial = p.grad_query_partials + (group * p.batch + sample) * p.key_channels * p.padded_queries + query;
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int channel = 8 * j + lane() % 4 * 2 + c;
        if (channel < p.key_channels) {
          float* address = partial + static_cast<int64_t>(channel) * p.padded_queries;
          address[0] = grad_query[j][c];
          address[8] = grad_query[j][c + 2];
        }
      }
    }
  }

  template <int kTiles>
  static __device__ __forceinline__ void clear(float (&d)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        d[j][c] = 0.0f;
      }
    }
  }

  // By the second warpgroup: it has read the first one's dS, which may store that of its next tile, if there is one.
  __device__ __forceinline__ void allow_next_gradient(int query_block, int key_block) const {
    if (query_block + 1 < end_query_block || key_block + 1 < end_key_block) {
      ptx::named_barrier_arrive(kGradientRead, kBothWarpgroups);
    }
  }

  // All tiles of the block, for the queries of warpgroup 0 or 1 of the consumers. The second one's also computes
  // grad_key.
  template <int kWarpgroup>
  __device__ __forceinline__ void consume() const {
    const int keys = key_count();
    const unsigned char* query = query_shared + kWarpgroup * Traits::kTileBoxBytes;
    unsigned char* own_gradient =
        gradient_shared + kWarpgroup * (Traits::kGradientBuffers - 1) * Traits::kGradientBytes;
    RingPlaceOfChunk place;
    int tile = 0;
    for (int query_block = first_query_block; query_block < end_query_block; ++query_block) {
      const int first_query = query_block * Traits::kQueries + kWarpgroup * Traits::kWarpgroupQueries;
      float logsumexp[2], delta[2];  // of this thread's rows; 0 past the end
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int position = first_query + first_row() + 8 * h;
        const bool inside = position < p.queries;
        const int64_t index = static_cast<int64_t>(sample) * p.queries + position;
        logsumexp[h] = inside ? p.logsumexp[index] : 0.0f;
        delta[h] = inside ? p.delta[index] : 0.0f;
      }
      QueryGradient grad_query;
      clear(grad_query);
      ptx::mbarrier_wait(&barriers->query_full, query_parity(query_block));
      for (int key_block = first_key_block; key_block < end_key_block; ++key_block, ++tile) {
        const unsigned char* key = key_shared + key_slot(tile) * Traits::kTileBytes;
        ptx::mbarrier_wait(&barriers->key_full[key_slot(tile)], key_parity(tile));
        Energies energies, weight_gradients;
        multiply_energies(energies, query, key);
        // Each pass issues a chunk, waits for the products before it, and releases their stage.
        const auto next_chunk = [&](int chunk) {
          ptx::mbarrier_wait(&barriers->chunk_full[place.stage], place.parity);
          const unsigned char* stage = ring_shared + place.stage * Traits::kStageBytes;
          multiply_chunk(
              weight_gradients,
              (Traits::kKeepsGradOutput ? resident_shared + chunk * Traits::kChunkBytes : stage) +
                  kWarpgroup * Traits::kChunkBoxBytes,
              stage + Traits::kStageBytes - Traits::kChunkBytes, chunk > 0);
        };
        int last_stage = 0;
        const auto release_last = [&] { release(&barriers->chunk_empty[last_stage]); };
#pragma unroll
        for (int chunk = 0; chunk < Traits::kExponentialParts; ++chunk) {
          next_chunk(chunk);
          ptx::wgmma_wait<1>();
          if (chunk == 0) {
            ptx::hold(energies);
          } else {
            release_last();
          }
          last_stage = place.stage;
          place.advance();
          exponentials(energies, chunk, logsumexp);
        }
#pragma unroll 1
        for (int chunk = Traits::kExponentialParts; chunk < chunks; ++chunk) {
          next_chunk(chunk);
          ptx::wgmma_wait<1>();
          release_last();
          last_stage = place.stage;
          place.advance();
        }
        ptx::wgmma_wait<0>();
        ptx::hold(weight_gradients);
        release_last();

        Gradient gradient;
        energy_gradient(
            gradient, energies, weight_gradients, delta, p.queries - first_query, keys - key_block * Traits::kKeys);
        multiply_query_gradient(grad_query, gradient, key);
        uint64_t* key_empty = &barriers->key_empty[key_slot(tile)];
        if constexpr (kWarpgroup == 0) {
          if (tile > 0) {
            ptx::named_barrier_sync(kGradientRead, kBothWarpgroups);
          }
          ptx::wgmma_wait<0>();
          ptx::hold(grad_query);
          release(key_empty);
          store_gradient(own_gradient, gradient);
          ptx::named_barrier_arrive(kGradientWritten, kBothWarpgroups);
        } else {
          KeyGradient grad_key;
          if constexpr (Traits::kGradientBuffers == 1) {
            start_grad_key(grad_key, query_block, key_block, 0);
            ptx::named_barrier_sync(kGradientWritten, kBothWarpgroups);
            multiply_key_gradient(grad_key, query_shared, gradient_shared, 0);
            ptx::wgmma_wait<1>();
            ptx::hold(grad_query);
            release(key_empty);
            ptx::wgmma_wait<0>();
            ptx::hold(grad_key);
            ptx::named_barrier_sync(kSecondWarpgroup, kOneWarpgroup);  // the first one's dS has been read
            store_gradient(own_gradient, gradient);
            ptx::named_barrier_sync(kSecondWarpgroup, kOneWarpgroup);
            multiply_key_gradient(grad_key, query, own_gradient, 0);
            ptx::wgmma_wait<0>();
            ptx::hold(grad_key);
            allow_next_gradient(query_block, key_block);
            move_grad_key<Transfer::kStore>(grad_key, key_block, 0);
          } else {
            ptx::wgmma_wait<0>();
            ptx::hold(grad_query);
            release(key_empty);
            ptx::named_barrier_sync(kSecondWarpgroup, kOneWarpgroup);  // the last tile's dS has been read
            store_gradient(own_gradient, gradient);
            start_grad_key(grad_key, query_block, key_block, 0);
            ptx::named_barrier_sync(kGradientWritten, kBothWarpgroups);
#pragma unroll
            for (int row_block = 0; row_block < kRowBlocks; ++row_block) {
              if (row_block > 0) {
                start_grad_key(grad_key, query_block, key_block, row_block);
              }
              multiply_key_gradient(grad_key, query_shared, gradient_shared, row_block);
              multiply_key_gradient(grad_key, query, own_gradient, row_block);
              ptx::wgmma_wait<0>();
              ptx::hold(grad_key);
              if (row_block + 1 == kRowBlocks) {
                allow_next_gradient(query_block, key_block);
              }
              move_grad_key<Transfer::kStore>(grad_key, key_block, row_block);
            }
          }
        }
      }
      release(&barriers->query_empty);
      store_grad_query(grad_query, first_query + first_row());
    }
  }
};

// Each role constructs its own object: what is computed before they part would take registers in all of them.
template <class Traits, Keys kKeys>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    wgmma_query_key_gradient_kernel(const __grid_constant__ WgmmaQueryKeyGradientParams params) {
  using Kernel = WgmmaQueryKeyGradient<Traits, kKeys>;
  SEGATTN_DYNAMIC_SHARED(unsigned char, shared);
  if (threadIdx.x == 0) {
    Kernel(params, shared).initialise_barriers();
  }
  __syncthreads();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (warpgroup == 0) {
    ptx::decrease_registers<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) {
      Kernel(params, shared).produce_chunks();
    } else if (threadIdx.x == 32) {
      Kernel(params, shared).produce_tiles();
    }
  } else if (warpgroup == 1) {
    ptx::increase_registers<Traits::kConsumerRegisters>();
    Kernel(params, shared).template consume<0>();
  } else {
    ptx::increase_registers<Traits::kConsumerRegisters>();
    Kernel(params, shared).template consume<1>();
  }
}

}  // namespace segattn::cuda
