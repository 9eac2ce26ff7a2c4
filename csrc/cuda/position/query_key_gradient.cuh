// The gradients of query and key on tensor cores, together: both need dS = P (dP - delta), and dP = grad_output^T value
// contracts over all value channels, most of the work, so it is made once.
//
// A block takes kQueries x kKeys tiles of the map: key blocks of its group in the inner loop, query blocks of its range
// in the outer one. Per tile:
//   1. dP, contracted over C; grad_output and value come in chunks of 32 channels through a ring of kStages,
//   2. S from the query and key tiles, P = exp(scale S - logsumexp), dS = P (dP - delta) into shared memory,
//   3. grad_query^T (E x kQueries) += key dS^T and grad_key^T (E x kKeys) += query dS.
// grad_query stays in registers over the inner loop where E <= 64. What does not stay (grad_key, and grad_query of a
// larger E) is added to a float32 partial result in global memory that only this block touches: no atomics, and the
// same sum in every run. The value gradient is a weighted sum of its own (weighted_sum.cuh): kept here, its C x keys
// accumulators would leave no registers, and making the scores twice costs E of 3 E + 2 C.
//
// An error of delta is the same for all keys of a query, so it does not average out in grad_query (docs/decisions.md).
// 16-bit types get a delta from the output before it was rounded. For float32 the block also sums mean_key, sum_j P_ij
// key_j, and grad_sum, sum_j dS_ij, which is 0 but for errors of delta; sum_partials_kernel takes their product off.
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

// kKeepsQueryGradient: for E <= kGradientRows, grad_query's tile stays in registers.
template <
    class Mma_, int kQueries_, int kKeys_, int kQueryWarps_, int kKeyWarps_, int kStages_, bool kKeepsQueryGradient_>
struct QueryKeyGradientTraits {
  using Mma = Mma_;
  using Element = typename Mma::Element;
  static constexpr int kQueries = kQueries_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = kStages_;
  static constexpr bool kKeepsQueryGradient = kKeepsQueryGradient_;
  static constexpr int kQueryWarps = kQueryWarps_;  // of the map's tile
  static constexpr int kKeyWarps = kKeyWarps_;
  static constexpr int kWarps = kQueryWarps * kKeyWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpQueries = kQueries / kQueryWarps;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kChunk = 32;         // value channels a stage
  static constexpr int kGradientRows = 64;  // key channels of the gradients made at a time
  static constexpr bool kCentres = sizeof(Element) == 4;
  static constexpr int kRowWarps = 2;  // warps over those, the others over positions
  static constexpr int kColumnWarps = kWarps / kRowWarps;

  static_assert(kWarpQueries % 16 == 0 && kWarpKeys % 16 == 0, "warp tiles consist of mma tiles");
  static_assert(kWarpQueries * kWarpKeys <= 64 * 32, "dP and S of a warp's tile take 64 registers a thread each");
  static_assert(
      kQueries / kColumnWarps % 16 == 0 && kKeys / kColumnWarps % 16 == 0, "gradient tiles consist of mma tiles");
  static_assert(kStages >= 2, "a copy is under way while another stage is multiplied");

  using QueryTile = SharedTile<Element, kQueries>;  // rows are channels
  using KeyTile = SharedTile<Element, kKeys>;       // rows are channels; of dS, queries

  static constexpr __host__ __device__ int embedding_rows(int key_channels) {
    return kKeepsQueryGradient ? kGradientRows : round_up(key_channels, kGradientRows);
  }
  static constexpr int kStageBytes = QueryTile::bytes(kChunk) + KeyTile::bytes(kChunk);
  static constexpr int kGradientBytes = KeyTile::bytes(kQueries);  // dS, [query][key]
  // kCentres: P, like dS, and each key warp's share of grad_sum
  static constexpr int kCentreBytes = kCentres ? kGradientBytes + 4 * kKeyWarps * kQueries : 0;
  static constexpr __host__ __device__ int shared_bytes(int key_channels) {
    return QueryTile::bytes(embedding_rows(key_channels)) + KeyTile::bytes(embedding_rows(key_channels)) +
        kStages * kStageBytes + kGradientBytes + kCentreBytes + 2 * kQueries * 4;
  }
};

template <class Traits_>
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
  unsigned char* gradient_shared;
  unsigned char* weight_shared;  // kCentres
  float* grad_sum_shared;        // kCentres: [kKeyWarps][kQueries]
  float* logsumexp_shared;       // [kQueries]
  float* delta_shared;           // [kQueries]
  int64_t sample;
  int group, range;
  int embedding_rows, chunks;
  int first_query_block, end_query_block, first_key_block, end_key_block;

  __device__ __forceinline__ GlobalMatrix<Element> matrix(const Operand& operand, int rows, int columns) const {
    return {
        static_cast<const Element*>(operand.data) + sample * operand.batch_stride, operand.row_stride, rows, columns};
  }
  __device__ __forceinline__ float* grad_query() const {
    return p.grad_query + (group * p.batch + sample) * p.key_channels * p.padded_queries;
  }
  __device__ __forceinline__ float* mean_key() const {
    return p.mean_key + (group * p.batch + sample) * p.key_channels * p.padded_queries;
  }
  __device__ __forceinline__ float* grad_key() const {
    return p.grad_key + (range * p.batch + sample) * p.key_channels * p.padded_keys;
  }

  // The ring's next chunk to copy: all chunks of all tiles, in the order they are multiplied.
  int copy_query_block, copy_key_block, copy_chunk, copy_slot;

  float grad_query_sums[kRowTiles][kQueryTiles][4];

  __device__ __forceinline__ unsigned char* slot(int index) const { return ring_shared + index * Traits::kStageBytes; }

  __device__ __forceinline__ void copy_next_chunk() {
    if (copy_query_block < end_query_block) {
      const int row = copy_chunk * Traits::kChunk;
      copy_tile_async<Traits::kThreads>(
          QueryTile(slot(copy_slot)), matrix(p.grad_output, p.value_channels, p.queries), row, Traits::kChunk,
          copy_query_block * Traits::kQueries);
      copy_tile_async<Traits::kThreads>(
          KeyTile(slot(copy_slot) + QueryTile::bytes(Traits::kChunk)), matrix(p.value, p.value_channels, p.keys), row,
          Traits::kChunk, copy_key_block * Traits::kKeys);
      copy_slot = copy_slot + 1 == Traits::kStages ? 0 : copy_slot + 1;
      if (++copy_chunk == chunks) {
        copy_chunk = 0;
        if (++copy_key_block == end_key_block) {
          copy_key_block = first_key_block;
          ++copy_query_block;
        }
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

  // A partial result's tile: rows are key channels [row, row + kRowTiles 16), columns [column, ...).
  template <bool kStore, int kColumns>
  __device__ __forceinline__ void move_partial(
      float (&d)[kRowTiles][kColumns][4], float* partial, int padded, int row, int column) {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int channel = row + 16 * i + lane / 4 + 8 * h;
        if (channel < p.key_channels) {
          float* at = partial + static_cast<int64_t>(channel) * padded + column + lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            if constexpr (kStore) {
              *reinterpret_cast<float2*>(at + 8 * j) = make_float2(d[i][j][2 * h], d[i][j][2 * h + 1]);
            } else {
              const float2 pair = *reinterpret_cast<const float2*>(at + 8 * j);
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

  // Rows of a query block; both are 0 past the end, where the scores are 0 as well: weights stay finite and unused.
  __device__ __forceinline__ void load_statistics(int query_block) {
    for (int i = static_cast<int>(threadIdx.x); i < Traits::kQueries; i += Traits::kThreads) {
      const int position = query_block * Traits::kQueries + i;
      const bool inside = position < p.queries;
      logsumexp_shared[i] = inside ? p.logsumexp[sample * p.queries + position] : 0.0f;
      delta_shared[i] = inside ? p.delta[sample * p.queries + position] : 0.0f;
    }
    if constexpr (Traits::kCentres) {
      for (int i = static_cast<int>(threadIdx.x); i < Traits::kKeyWarps * Traits::kQueries; i += Traits::kThreads) {
        grad_sum_shared[i] = 0.0f;
      }
    }
  }

  // dP becomes dS, in registers, then in shared memory. Queries past the end have grad_output and delta 0, hence dS 0;
  // keys past the end are cut off.
  __device__ __forceinline__ void store_score_gradient(
      const float (&scores)[kM][kN][4], const float (&products)[kM][kN][4], int key_block) {
    const int lane = lane_index();
    const KeyTile tile(gradient_shared), weight_tile(weight_shared);
    const int keys_left = p.keys - key_block * Traits::kKeys;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_query() + 16 * i + lane / 4 + 8 * h;
        const float row_logsumexp = logsumexp_shared[row], row_delta = delta_shared[row];
        float row_sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const int column = warp_key() + 8 * j + lane % 4 * 2;
          float weight[2], gradient[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            weight[c] = ptx::exp2_approx((scores[i][j][2 * h + c] * p.scale - row_logsumexp) * kLog2E);
            gradient[c] = column + c < keys_left ? weight[c] * (products[i][j][2 * h + c] - row_delta) : 0.0f;
          }
          store_pair(tile.at(row, column), gradient[0], gradient[1]);
          if constexpr (Traits::kCentres) {  // past the end the weight may be infinite, and the key is 0
            store_pair(
                weight_tile.at(row, column), column < keys_left ? weight[0] : 0.0f,
                column + 1 < keys_left ? weight[1] : 0.0f);
            row_sum += gradient[0] + gradient[1];
          }
        }
        if constexpr (Traits::kCentres) {
          row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 1);
          row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 2);
          if (lane % 4 == 0) {
            grad_sum_shared[warp_index() % Traits::kKeyWarps * Traits::kQueries + row] += row_sum;
          }
        }
      }
    }
  }

  // Adds one tile's shares. Partial results start with the block's first query block (grad_key) and key block.
  __device__ __forceinline__ void add_gradients(int query_block, int key_block) {
    const QueryTile query_tile(query_shared);
    const KeyTile key_tile(key_shared), gradient_tile(gradient_shared);
    const int query_column = warp_column(Traits::kQueries), key_column = warp_column(Traits::kKeys);
    for (int row = warp_row(); row < p.key_channels; row += Traits::kGradientRows) {
      float sums[kRowTiles][kKeyTiles][4];
      clear(sums);
      const int column = key_block * Traits::kKeys + key_column;
      if (query_block > first_query_block) {
        move_partial<false>(sums, grad_key(), p.padded_keys, row, column);
      }
      multiply_tiles<Mma, Major::kRow, Major::kRow, 1>(
          sums, query_tile, row, gradient_tile, key_column, 0, Traits::kQueries);
      move_partial<true>(sums, grad_key(), p.padded_keys, row, column);
      if constexpr (!Traits::kKeepsQueryGradient) {
        clear(grad_query_sums);
        if (key_block > first_key_block) {
          move_partial<false>(
              grad_query_sums, grad_query(), p.padded_queries, row, query_block * Traits::kQueries + query_column);
        }
      }
      multiply_tiles<Mma, Major::kRow, Major::kColumn, 1>(
          grad_query_sums, key_tile, row, gradient_tile, query_column, 0, Traits::kKeys);
      if constexpr (!Traits::kKeepsQueryGradient) {
        move_partial<true>(
            grad_query_sums, grad_query(), p.padded_queries, row, query_block * Traits::kQueries + query_column);
      }
      if constexpr (Traits::kCentres) {
        const int mean_column = query_block * Traits::kQueries + query_column;
        float means[kRowTiles][kQueryTiles][4];
        clear(means);
        if (key_block > first_key_block) {
          move_partial<false>(means, mean_key(), p.padded_queries, row, mean_column);
        }
        multiply_tiles<Mma, Major::kRow, Major::kColumn, 1>(
            means, key_tile, row, KeyTile(weight_shared), query_column, 0, Traits::kKeys);
        move_partial<true>(means, mean_key(), p.padded_queries, row, mean_column);
      }
    }
  }

  // The group's share of a query block's grad_sum; the key warps' shares in their order.
  __device__ __forceinline__ void store_grad_sum(int query_block) const {
    float* target = p.grad_sum + (group * p.batch + sample) * p.padded_queries + query_block * Traits::kQueries;
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
    embedding_rows = Traits::embedding_rows(p.key_channels);
    query_shared = shared;
    key_shared = query_shared + QueryTile::bytes(embedding_rows);
    ring_shared = key_shared + KeyTile::bytes(embedding_rows);
    gradient_shared = ring_shared + Traits::kStages * Traits::kStageBytes;
    weight_shared = gradient_shared + Traits::kGradientBytes;
    grad_sum_shared = reinterpret_cast<float*>(weight_shared + (Traits::kCentres ? Traits::kGradientBytes : 0));
    logsumexp_shared = reinterpret_cast<float*>(gradient_shared + Traits::kGradientBytes + Traits::kCentreBytes);
    delta_shared = logsumexp_shared + Traits::kQueries;
  }

  __device__ __forceinline__ void run() {
    // Blocks that run together share a query range, whose grad_output they take from L2 at about the same time.
    int64_t block = blockIdx.x;
    group = static_cast<int>(block % p.groups);
    block /= p.groups;
    range = static_cast<int>(block % p.ranges);
    sample = block / p.ranges;

    first_query_block = range * p.blocks_per_range;
    end_query_block = min(first_query_block + p.blocks_per_range, p.query_blocks);
    first_key_block = group * p.blocks_per_group;
    end_key_block = min(first_key_block + p.blocks_per_group, p.key_blocks);
    chunks = ceil_div(p.value_channels, Traits::kChunk);

    copy_query_block = first_query_block;
    copy_key_block = first_key_block;
    copy_chunk = copy_slot = 0;
#pragma unroll
    for (int n = 0; n + 1 < Traits::kStages; ++n) {
      copy_next_chunk();
      ptx::cp_async_commit();
    }

    int current_slot = 0;
    for (int query_block = first_query_block; query_block < end_query_block; ++query_block) {
      clear(grad_query_sums);
      for (int key_block = first_key_block; key_block < end_key_block; ++key_block) {
        __syncthreads();  // the previous tile's query, key and dS are no longer read
        if (key_block == first_key_block) {
          copy_tile_async<Traits::kThreads>(
              QueryTile(query_shared), matrix(p.query, p.key_channels, p.queries), 0, embedding_rows,
              query_block * Traits::kQueries);
          load_statistics(query_block);
        }
        // These copies join the group of the next chunk; they have arrived when that is waited for.
        copy_tile_async<Traits::kThreads>(
            KeyTile(key_shared), matrix(p.key, p.key_channels, p.keys), 0, embedding_rows, key_block * Traits::kKeys);

        float products[kM][kN][4];
        clear(products);
        for (int chunk = 0; chunk < chunks; ++chunk) {
          ptx::cp_async_wait<Traits::kStages - 2>();
          __syncthreads();  // this chunk is there, the previous one is no longer read
          copy_next_chunk();
          ptx::cp_async_commit();
          multiply_tiles<Mma, Major::kColumn, Major::kRow, 2>(
              products, QueryTile(slot(current_slot)), warp_query(),
              KeyTile(slot(current_slot) + QueryTile::bytes(Traits::kChunk)), warp_key(), 0, Traits::kChunk);
          current_slot = current_slot + 1 == Traits::kStages ? 0 : current_slot + 1;
        }
        if (chunks < Traits::kStages) {  // the group that query and key joined has not been waited for
          ptx::cp_async_wait<0>();
          __syncthreads();
        }

        float scores[kM][kN][4];
        clear(scores);
        multiply_tiles<Mma, Major::kColumn, Major::kRow, 1>(
            scores, QueryTile(query_shared), warp_query(), KeyTile(key_shared), warp_key(), 0,
            round_up(p.key_channels, Mma::kStep));
        store_score_gradient(scores, products, key_block);
        __syncthreads();
        add_gradients(query_block, key_block);
      }
      if constexpr (Traits::kKeepsQueryGradient) {
        move_partial<true>(
            grad_query_sums, grad_query(), p.padded_queries, warp_row(),
            query_block * Traits::kQueries + warp_column(Traits::kQueries));
      }
      if constexpr (Traits::kCentres) {
        store_grad_sum(query_block);
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) query_key_gradient_kernel(const QueryKeyGradientParams params) {
#if defined(SEGATTN_EMULATED) || __CUDA_ARCH__ >= 800
  SEGATTN_DYNAMIC_SHARED(unsigned char, shared);
  QueryKeyGradient<Traits>(params, shared).run();
#endif
}

}  // namespace segattn::cuda
