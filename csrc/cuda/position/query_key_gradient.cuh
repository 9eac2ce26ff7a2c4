// The gradients of query and key on tensor cores, in one kernel. Both need dS = P (dP - delta), the gradient of the
// energies, and dP = grad_output^T value contracts over all value channels: most of the work, and it is done only once.
//
// A block processes kQueries x kKeys tiles of the attention map: the outer loop is over the query blocks of its range,
// the inner loop over the key blocks of its group. For each tile it computes
//   1. dP, contracted over C, with grad_output and value in chunks of 32 channels through a ring of kStages; where
//      shared memory has room for all channels of a query block, its grad_output is read once and stays there,
//   2. the energies from the query and key tiles, P = exp(energy - logsumexp), and dS, which goes to shared memory,
//   3. grad_query^T (E x kQueries) += key dS^T and grad_key^T (E x kKeys) += query dS.
// For E <= 64 grad_query stays in registers during the inner loop. The other sums, grad_key and for larger E
// grad_query, are float32 partials in global memory. Only this block accesses them: no atomics, and the same result in
// every run. grad_value has its own kernel (weighted_sum.cuh): its C x keys accumulators would leave no registers here,
// and computing the energies twice costs E of 3 E + 2 C.
//
// An error of delta is the same for all keys of a query, so it does not average out in grad_query (docs/decisions.md).
// For 16-bit types, delta is computed from the output before rounding. For float32, the block also computes mean_key =
// sum_j P_ij key_j and grad_sum = sum_j dS_ij. Over all keys of the logsumexp, grad_sum is the gradient of the
// logsumexp, 0 without one, except for errors of delta; sum_partials_kernel subtracts the product of this error with
// mean_key from grad_query. grad_key has no such remedy. With TF32, delta is therefore the sum of P dP as closely as it
// can be known without another pass: of grad_output rounded to TF32, and of an output that is divided by the sum of the
// rounded weights (weighted_sum_softmax.cuh).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/position/params.h"

namespace segattn::cuda {

// Where a block accumulates grad_query: in registers, for E <= kGradientRows, or in global memory, for any E.
enum class QueryGradientSums { kRegisters, kGlobalMemory };

template <
    class Mma_, int kQueries_, int kKeys_, int kQueryWarps_, int kKeyWarps_, int kStages_, QueryGradientSums kSums_,
    GradOutput kGradOutput_ = GradOutput::kStreamed>
struct QueryKeyGradientTraits {
  using Mma = Mma_;
  using Element = typename Mma::Element;
  static constexpr int kQueries = kQueries_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = kStages_;
  static constexpr bool kKeepsQueryGradient = kSums_ == QueryGradientSums::kRegisters;
  static constexpr bool kKeepsGradOutput = kGradOutput_ == GradOutput::kResident;
  static constexpr int kQueryWarps = kQueryWarps_;  // of the tile of the attention map
  static constexpr int kKeyWarps = kKeyWarps_;
  static constexpr int kWarps = kQueryWarps * kKeyWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpQueries = kQueries / kQueryWarps;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kChunk = 32;         // value channels of a stage
  static constexpr int kGradientRows = 64;  // key channels of the gradients computed at a time
  static constexpr bool kCorrectsQueryGradient = sizeof(Element) == 4;
  static constexpr int kRowWarps = 2;  // warps along the gradient rows; kColumnWarps along positions
  static constexpr int kColumnWarps = kWarps / kRowWarps;

  static_assert(kWarpQueries % 16 == 0 && kWarpKeys % 16 == 0, "warp tiles consist of mma tiles");
  static_assert(
      kWarpQueries * kWarpKeys <= 64 * 32, "dP and the energies of a warp's tile take 64 registers a thread each");
  static_assert(
      kQueries / kColumnWarps % 16 == 0 && kKeys / kColumnWarps % 16 == 0, "gradient tiles consist of mma tiles");
  static_assert(kStages >= 2, "one stage is copied while another is multiplied");

  using QueryTile = SharedTile<Element, kQueries>;  // rows are channels
  using KeyTile = SharedTile<Element, kKeys>;       // rows are channels; of dS, queries

  static constexpr __host__ __device__ int key_channel_rows(int key_channels) {
    return kKeepsQueryGradient ? kGradientRows : round_up(key_channels, kGradientRows);
  }
  static constexpr int kKeptRows = kKeepsQueryGradient ? kGradientRows : 0;  // key_channel_rows where it is a constant
  // A stage: grad_output unless it is resident, then value.
  static constexpr int kStageValue = kKeepsGradOutput ? 0 : QueryTile::bytes(kChunk);
  static constexpr int kStageBytes = kStageValue + KeyTile::bytes(kChunk);
  static constexpr __host__ __device__ int resident_bytes(int value_channels) {
    return kKeepsGradOutput ? QueryTile::bytes(round_up(value_channels, kChunk)) : 0;
  }
  // A chunk of the next query block's grad_output is copied kStages - 1 chunks ahead, and must not meet its
  // predecessor in the same place before that has been read.
  static constexpr int kLeastValueChannels = kKeepsGradOutput ? (kStages - 1) * kChunk + 1 : 0;
  static constexpr int kGradientBytes = KeyTile::bytes(kQueries);  // dS, [query][key]
  // P, laid out like dS, and each key warp's partial of grad_sum
  static constexpr int kCorrectionBytes = kCorrectsQueryGradient ? kGradientBytes + 4 * kKeyWarps * kQueries : 0;
  // The rounding of 16-bit weights is coarser than that of the logsumexp.
  static constexpr bool kSubtractsLow = sizeof(Element) == 4;
  static constexpr int kStatisticsBytes = (kSubtractsLow ? 3 : 2) * kQueries * 4;
  static constexpr __host__ __device__ int shared_bytes(int key_channels, int value_channels) {
    return QueryTile::bytes(key_channel_rows(key_channels)) + KeyTile::bytes(key_channel_rows(key_channels)) +
        kStages * kStageBytes + kGradientBytes + kCorrectionBytes + kStatisticsBytes + resident_bytes(value_channels);
  }
};

template <class Traits_, Keys kKeys>
struct QueryKeyGradient {
  using Traits = Traits_;
  using Mma = typename Traits::Mma;
  using Element = typename Traits::Element;
  using QueryTile = typename Traits::QueryTile;
  using KeyTile = typename Traits::KeyTile;
  static constexpr int kM = Traits::kWarpQueries / 16;
  static constexpr int kN = Traits::kWarpKeys / 8;
  static constexpr int kRowTiles = Traits::kGradientRows / Traits::kRowWarps / 16;
  static constexpr int kQueryTiles = Traits::kQueries / Traits::kColumnWarps / 8;
  static constexpr int kKeyTiles = Traits::kKeys / Traits::kColumnWarps / 8;

  const QueryKeyGradientParams& p;
  unsigned char* query_shared;
  unsigned char* key_shared;
  unsigned char* ring_shared;
  unsigned char* gradient_shared;  // dS, [query][key]
  unsigned char* weight_shared;    // kCorrectsQueryGradient: P, [query][key]
  float* grad_sum_shared;          // kCorrectsQueryGradient: [kKeyWarps][kQueries]
  float* logsumexp_shared;         // [kQueries]
  float* delta_shared;             // [kQueries]
  float* logsumexp_low_shared;     // kSubtractsLow: [kQueries]
  unsigned char* resident_shared;  // kKeepsGradOutput: grad_output of the query block, all channels
  int64_t sample;
  int group, range;
  int key_channel_rows, chunks;
  int first_query_block, end_query_block, first_key_block, end_key_block;
  int key_count;  // Keys::kKept: of the sample

  __device__ __forceinline__ int keys() const {
    if constexpr (kKeys == Keys::kKept) {
      return key_count;
    } else {
      return p.keys;
    }
  }

  __device__ __forceinline__ GlobalMatrix<Element> matrix(const Operand& operand, int rows, int columns) const {
    return {
        static_cast<const Element*>(operand.data) + sample * operand.batch_stride, operand.row_stride, rows, columns};
  }
  __device__ __forceinline__ float* grad_query() const {
    return p.grad_query_partials + (group * p.batch + sample) * p.key_channels * p.padded_queries;
  }
  __device__ __forceinline__ float* mean_key() const {
    return p.mean_key_partials + (group * p.batch + sample) * p.key_channels * p.padded_queries;
  }
  __device__ __forceinline__ float* grad_key() const {
    return p.grad_key_partials + (range * p.batch + sample) * p.key_channels * p.padded_keys;
  }

  // The next chunk to copy into the ring, and this thread's sources in it. Copies run through all chunks of all tiles
  // in the order of multiplication.
  int copy_query_block, copy_key_block, copy_channel;
  int copy_stage;  // bytes
  const Element* next_grad_output;
  const Element* next_value;

  float grad_query_sums[kRowTiles][kQueryTiles][4];

  static __device__ __forceinline__ int next_stage(int stage) {
    return stage + Traits::kStageBytes == Traits::kStages * Traits::kStageBytes ? 0 : stage + Traits::kStageBytes;
  }

  // This thread's sources in the first chunk of a tile.
  __device__ __forceinline__ void start_copies_of_tile() {
    using QueryShare = CopyShare<Traits::kThreads, Element, Traits::kQueries>;
    using KeyShare = CopyShare<Traits::kThreads, Element, Traits::kKeys>;
    const auto source = [&](const Operand& operand, int row, int column) {
      return static_cast<const Element*>(operand.data) + sample * operand.batch_stride + row * operand.row_stride +
          column;
    };
    copy_channel = 0;
    next_grad_output =
        source(p.grad_output, QueryShare::row(), copy_query_block * Traits::kQueries + QueryShare::column());
    next_value = source(p.value, KeyShare::row(), copy_key_block * Traits::kKeys + KeyShare::column());
  }

  __device__ __forceinline__ void copy_next_chunk() {
    if (copy_query_block < end_query_block) {
      const int channels_left = p.value_channels - copy_channel;
      unsigned char* stage = ring_shared + copy_stage;
      if (!Traits::kKeepsGradOutput || copy_key_block == first_key_block) {
        copy_share_async<Traits::kThreads, Traits::kChunk>(
            QueryTile(Traits::kKeepsGradOutput ? resident_shared + QueryTile::bytes(copy_channel) : stage),
            next_grad_output, p.grad_output.row_stride, Traits::kChunk, channels_left,
            p.queries - copy_query_block * Traits::kQueries);
      }
      copy_share_async<Traits::kThreads, Traits::kChunk>(
          KeyTile(stage + Traits::kStageValue), next_value, p.value.row_stride, Traits::kChunk, channels_left,
          keys() - copy_key_block * Traits::kKeys);
      copy_stage = next_stage(copy_stage);
      copy_channel += Traits::kChunk;
      next_grad_output += Traits::kChunk * p.grad_output.row_stride;
      next_value += Traits::kChunk * p.value.row_stride;
      if (copy_channel >= p.value_channels) {
        if (++copy_key_block == end_key_block) {
          copy_key_block = first_key_block;
          ++copy_query_block;
        }
        start_copies_of_tile();
      }
    }
  }

  template <int kRows, int kColumns>
  static __device__ __forceinline__ void clear(float (&d)[kRows][kColumns][4]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          d[i][j][c] = 0.0f;
        }
      }
    }
  }

  enum class Transfer { kLoad, kStore };

  // Moves a tile between registers and a partial in global memory: key channels [row, row + 16 kRowTiles), positions
  // [column, ...).
  template <Transfer kTransfer, int kColumns>
  __device__ __forceinline__ void move_partial(
      float (&d)[kRowTiles][kColumns][4], float* partial, int padded, int row, int column) {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int channel = row + 16 * i + lane / 4 + 8 * h;
        if (channel < p.key_channels) {
          float* address = partial + static_cast<int64_t>(channel) * padded + column + lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            if constexpr (kTransfer == Transfer::kStore) {
              *reinterpret_cast<float2*>(address + 8 * j) = make_float2(d[i][j][2 * h], d[i][j][2 * h + 1]);
            } else {
              const float2 pair = *reinterpret_cast<const float2*>(address + 8 * j);
              d[i][j][2 * h] = pair.x;
              d[i][j][2 * h + 1] = pair.y;
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ int warp_query() const { return warp_index() / Traits::kKeyWarps * Traits::kWarpQueries; }
  __device__ __forceinline__ int warp_key() const { return warp_index() % Traits::kKeyWarps * Traits::kWarpKeys; }
  __device__ __forceinline__ int warp_row() const {
    return warp_index() / Traits::kColumnWarps * (Traits::kGradientRows / Traits::kRowWarps);
  }
  __device__ __forceinline__ int warp_column(int columns) const {
    return warp_index() % Traits::kColumnWarps * (columns / Traits::kColumnWarps);
  }

  // logsumexp, its rounding error and delta of a query block, 0 past the end.
  __device__ __forceinline__ void load_statistics(int query_block) {
    for (int i = static_cast<int>(threadIdx.x); i < Traits::kQueries; i += Traits::kThreads) {
      const int position = query_block * Traits::kQueries + i;
      const bool inside = position < p.queries;
      logsumexp_shared[i] = inside ? p.logsumexp[sample * p.queries + position] : 0.0f;
      delta_shared[i] = inside ? p.delta[sample * p.queries + position] : 0.0f;
      if constexpr (Traits::kSubtractsLow) {
        logsumexp_low_shared[i] = inside ? p.logsumexp_low[sample * p.queries + position] : 0.0f;
      }
    }
    if constexpr (Traits::kCorrectsQueryGradient) {
      for (int i = static_cast<int>(threadIdx.x); i < Traits::kKeyWarps * Traits::kQueries; i += Traits::kThreads) {
        grad_sum_shared[i] = 0.0f;
      }
    }
  }

  // Turns q.k (`energies`) and dP into dS and stores it in shared memory. Queries and keys past the end get a weight of
  // 0. The one computed from q.k can be NaN for a query, 0 times a key of -inf, and infinite for a key.
  __device__ __forceinline__ void store_energy_gradient(
      float (&energies)[kM][kN][4], const float (&weight_gradients)[kM][kN][4], int query_block, int key_block) {
    const int lane = lane_index(), first_row = warp_query() + lane / 4, first_column = warp_key() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float row_logsumexp = logsumexp_shared[first_row + 16 * i + 8 * h];
        const float row_low = Traits::kSubtractsLow ? logsumexp_low_shared[first_row + 16 * i + 8 * h] : 0.0f;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int c = 2 * h; c < 2 * h + 2; ++c) {
            const float difference = __fmaf_rn(energies[i][j][c], p.scale, -row_logsumexp);
            energies[i][j][c] = ptx::exp2_approx((Traits::kSubtractsLow ? difference - row_low : difference) * kLog2E);
          }
        }
      }
    }
    const int queries_left = p.queries - query_block * Traits::kQueries;
    const int keys_left = keys() - key_block * Traits::kKeys;
    if (queries_left < Traits::kQueries || keys_left < Traits::kKeys) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const bool inside = first_column + 8 * j + c % 2 < keys_left;
#pragma unroll
          for (int i = 0; i < kM; ++i) {
            if (!inside || first_row + 16 * i + c / 2 * 8 >= queries_left) {
              energies[i][j][c] = 0.0f;
            }
          }
        }
      }
    }
    const TilePosition position(KeyTile(gradient_shared), first_row, first_column);
    const TilePosition weight_position(KeyTile(weight_shared), first_row, first_column);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * i + 8 * h;
        const float row_delta = delta_shared[first_row + row];
        float row_sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          float weight[2], gradient[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            weight[c] = energies[i][j][2 * h + c];
            gradient[c] = weight[c] * (weight_gradients[i][j][2 * h + c] - row_delta);
          }
          store_pair(position.at(row, 8 * j), gradient[0], gradient[1]);
          if constexpr (Traits::kCorrectsQueryGradient) {
            store_pair(weight_position.at(row, 8 * j), weight[0], weight[1]);
            row_sum += gradient[0] + gradient[1];
          }
        }
        if constexpr (Traits::kCorrectsQueryGradient) {
          row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 1);
          row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 2);
          if (lane % 4 == 0) {
            grad_sum_shared[warp_index() % Traits::kKeyWarps * Traits::kQueries + first_row + row] += row_sum;
          }
        }
      }
    }
  }

  // Adds a tile's contribution to the gradients. A partial of grad_key starts at the block's first query block, the
  // others at its first key block.
  __device__ __forceinline__ void add_gradients(int query_block, int key_block) {
    const QueryTile query_tile(query_shared);
    const KeyTile key_tile(key_shared), gradient_tile(gradient_shared);
    const int query_column = warp_column(Traits::kQueries), key_column = warp_column(Traits::kKeys);
    for (int row = warp_row(); row < p.key_channels; row += Traits::kGradientRows) {
      float sums[kRowTiles][kKeyTiles][4];
      clear(sums);
      const int column = key_block * Traits::kKeys + key_column;
      if (query_block > first_query_block) {
        move_partial<Transfer::kLoad>(sums, grad_key(), p.padded_keys, row, column);
      }
      multiply_tiles<Mma, Major::kRow, Major::kRow, 1>(
          sums, query_tile, row, gradient_tile, key_column, 0, Traits::kQueries);
      move_partial<Transfer::kStore>(sums, grad_key(), p.padded_keys, row, column);
      if constexpr (!Traits::kKeepsQueryGradient) {
        clear(grad_query_sums);
        if (key_block > first_key_block) {
          move_partial<Transfer::kLoad>(
              grad_query_sums, grad_query(), p.padded_queries, row, query_block * Traits::kQueries + query_column);
        }
      }
      multiply_tiles<Mma, Major::kRow, Major::kColumn, 1>(
          grad_query_sums, key_tile, row, gradient_tile, query_column, 0, Traits::kKeys);
      if constexpr (!Traits::kKeepsQueryGradient) {
        move_partial<Transfer::kStore>(
            grad_query_sums, grad_query(), p.padded_queries, row, query_block * Traits::kQueries + query_column);
      }
      if constexpr (Traits::kCorrectsQueryGradient) {
        const int mean_column = query_block * Traits::kQueries + query_column;
        float means[kRowTiles][kQueryTiles][4];
        clear(means);
        if (key_block > first_key_block) {
          move_partial<Transfer::kLoad>(means, mean_key(), p.padded_queries, row, mean_column);
        }
        multiply_tiles<Mma, Major::kRow, Major::kColumn, 1>(
            means, key_tile, row, KeyTile(weight_shared), query_column, 0, Traits::kKeys);
        move_partial<Transfer::kStore>(means, mean_key(), p.padded_queries, row, mean_column);
      }
    }
  }

  // Stores the group's partial of grad_sum for a query block: the sum over the key warps, in order.
  __device__ __forceinline__ void store_grad_sum(int query_block) const {
    float* target =
        p.grad_sum_partials + (group * p.batch + sample) * p.padded_queries + query_block * Traits::kQueries;
    for (int i = static_cast<int>(threadIdx.x); i < Traits::kQueries; i += Traits::kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < Traits::kKeyWarps; ++warp) {
        sum += grad_sum_shared[warp * Traits::kQueries + i];
      }
      target[i] = sum;
    }
  }

  __device__ __forceinline__ QueryKeyGradient(const QueryKeyGradientParams& params, unsigned char* shared) : p(params) {
    key_channel_rows = Traits::key_channel_rows(p.key_channels);
    query_shared = shared;
    key_shared = query_shared + QueryTile::bytes(key_channel_rows);
    ring_shared = key_shared + KeyTile::bytes(key_channel_rows);
    gradient_shared = ring_shared + Traits::kStages * Traits::kStageBytes;
    weight_shared = gradient_shared + Traits::kGradientBytes;
    grad_sum_shared =
        reinterpret_cast<float*>(weight_shared + (Traits::kCorrectsQueryGradient ? Traits::kGradientBytes : 0));
    logsumexp_shared = reinterpret_cast<float*>(gradient_shared + Traits::kGradientBytes + Traits::kCorrectionBytes);
    delta_shared = logsumexp_shared + Traits::kQueries;
    logsumexp_low_shared = delta_shared + Traits::kQueries;
    resident_shared = reinterpret_cast<unsigned char*>(logsumexp_shared) + Traits::kStatisticsBytes;
  }

  __device__ __forceinline__ void run() {
    // Blocks that run together share a query range, whose grad_output they read from L2 at about the same time.
    int64_t block = blockIdx.x;
    group = static_cast<int>(block % p.groups);
    block /= p.groups;
    range = static_cast<int>(block % p.ranges);
    sample = block / p.ranges;

    first_query_block = range * p.blocks_per_range;
    end_query_block = min(first_query_block + p.blocks_per_range, p.query_blocks);
    first_key_block = group * p.blocks_per_group;
    end_key_block = min(first_key_block + p.blocks_per_group, p.key_blocks);
    if constexpr (kKeys == Keys::kKept) {
      key_count = p.key_counts[sample];
      // A group without kept keys still processes one block, past the end: it stores partials of 0.
      end_key_block = min(end_key_block, max(ceil_div(key_count, Traits::kKeys), first_key_block + 1));
    }
    chunks = ceil_div(p.value_channels, Traits::kChunk);

    copy_query_block = first_query_block;
    copy_key_block = first_key_block;
    copy_stage = 0;
    start_copies_of_tile();
#pragma unroll
    for (int n = 0; n + 1 < Traits::kStages; ++n) {
      copy_next_chunk();
      ptx::cp_async_commit();
    }

    int stage = 0;  // bytes
    for (int query_block = first_query_block; query_block < end_query_block; ++query_block) {
      clear(grad_query_sums);
      for (int key_block = first_key_block; key_block < end_key_block; ++key_block) {
        __syncthreads();  // the last tile's query, key and dS are no longer read
        if (key_block == first_key_block) {
          copy_tile_async<Traits::kThreads, Traits::kKeptRows>(
              QueryTile(query_shared), matrix(p.query, p.key_channels, p.queries), 0, key_channel_rows,
              query_block * Traits::kQueries);
          load_statistics(query_block);
        }
        // These copies join the commit group of the next chunk and arrive with it.
        copy_tile_async<Traits::kThreads, Traits::kKeptRows>(
            KeyTile(key_shared), matrix(p.key, p.key_channels, keys()), 0, key_channel_rows, key_block * Traits::kKeys);

        float weight_gradients[kM][kN][4];
        clear(weight_gradients);
        for (int chunk = 0; chunk < chunks; ++chunk) {
          ptx::cp_async_wait<Traits::kStages - 2>();
          __syncthreads();  // this chunk has arrived, and the last one is no longer read
          copy_next_chunk();
          ptx::cp_async_commit();
          multiply_tiles<Mma, Major::kColumn, Major::kRow, 2>(
              weight_gradients,
              QueryTile(
                  Traits::kKeepsGradOutput ? resident_shared + chunk * QueryTile::bytes(Traits::kChunk)
                                           : ring_shared + stage),
              warp_query(), KeyTile(ring_shared + stage + Traits::kStageValue), warp_key(), 0, Traits::kChunk);
          stage = next_stage(stage);
        }
        if (chunks < Traits::kStages) {  // no wait above has covered the group of query and key
          ptx::cp_async_wait<0>();
          __syncthreads();
        }

        float energies[kM][kN][4];
        clear(energies);
        multiply_tiles<Mma, Major::kColumn, Major::kRow, 1>(
            energies, QueryTile(query_shared), warp_query(), KeyTile(key_shared), warp_key(), 0,
            round_up(p.key_channels, Mma::kStep));
        store_energy_gradient(energies, weight_gradients, query_block, key_block);
        __syncthreads();
        add_gradients(query_block, key_block);
      }
      if constexpr (Traits::kKeepsQueryGradient) {
        move_partial<Transfer::kStore>(
            grad_query_sums, grad_query(), p.padded_queries, warp_row(),
            query_block * Traits::kQueries + warp_column(Traits::kQueries));
      }
      if constexpr (Traits::kCorrectsQueryGradient) {
        store_grad_sum(query_block);
      }
    }
  }
};

template <class Traits, Keys kKeys>
__global__ void __launch_bounds__(Traits::kThreads, 1) query_key_gradient_kernel(const QueryKeyGradientParams params) {
#if defined(SEGATTN_EMULATED) || __CUDA_ARCH__ >= 800
  SEGATTN_DYNAMIC_SHARED(unsigned char, shared);
  QueryKeyGradient<Traits, kKeys>(params, shared).run();
#endif
}

}  // namespace segattn::cuda
