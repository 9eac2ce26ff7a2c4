// What the position attention kernels are told: plain structs, filled by the host code, copied at the launch.
//
// Positions count in int (a feature map has fewer than 2^31), everything that indexes memory in int64_t. Operands are
// channels-first, a row a channel; strides are in elements. Tensor-core kernels need rows that start on 16 bytes.
#pragma once

#include <cstdint>

#include "cuda/common/operand.h"

namespace segattn::cuda {

constexpr int kMaxSplits = 16;  // of the streamed positions

// out[c, i] = sum_j weight(i, j) values[c, j] for the positions i a block owns, over the positions j streamed past it:
//                   owned   streamed  values       weight
//   forward         query   key       value        softmax_j(scale s_ij)
//   value gradient  key     query     grad_output  exp(scale s_ij - logsumexp_j)
struct WeightedSumParams {
  Operand owned;     // (B, E, owned_positions)
  Operand streamed;  // (B, E, streamed_positions)
  Operand values;    // (B, C, streamed_positions)
  void* output;      // (B, C, owned_positions), contiguous, of the operands' type; with splits > 1 float32
                     // (splits, B, C, owned_positions): each split's own result
  void*
      output_low;  // forward of 16-bit types, one split: what rounding took from the output, like it; null: not wanted
  float* logsumexp;  // forward: written, (B, owned_positions), with splits (splits, B, owned_positions);
                     // value gradient: read, (B, streamed_positions)
  int64_t batch;
  int owned_positions;
  int streamed_positions;
  int key_channels;    // E
  int value_channels;  // C
  float scale;
  int owned_blocks;
  int channel_blocks;
  int splits;
  int steps_per_split;  // streamed blocks a split takes
};

// Partial gradients of query and key. A block takes one group of key blocks and one range of query blocks; the key
// groups' shares of grad_query and the query ranges' shares of grad_key are summed afterwards, in a fixed order. For
// float32, so are the shares of what grad_query is centred with (query_key_gradient.cuh).
struct QueryKeyGradientParams {
  Operand query;           // (B, E, N)
  Operand key;             // (B, E, M)
  Operand value;           // (B, C, M)
  Operand grad_output;     // (B, C, N)
  const float* logsumexp;  // (B, N)
  const float* delta;      // (B, N): sum_c grad_output output
  float* grad_query;       // (groups, B, E, padded_queries), without scale
  float* grad_key;         // (ranges, B, E, padded_keys), without scale
  float* mean_key;         // float32: (groups, B, E, padded_queries), sum_j P_ij key_j
  float* grad_sum;         // float32: (groups, B, padded_queries), sum_j dS_ij, without scale
  int64_t batch;
  int queries;
  int keys;
  int padded_queries;  // multiples of the tile, so that the partial results have no edges
  int padded_keys;
  int key_channels;    // E
  int value_channels;  // C
  float scale;
  int query_blocks, ranges, blocks_per_range;
  int key_blocks, groups, blocks_per_group;
};

enum class PositionSum { kForward, kValueGradient, kQueryGradient, kKeyGradient };

// The SIMT kernels' four sums have one form: out[c, i] = factor * sum_j weight(i, j) values[c, j].
//                   owned   streamed  values       left         right        weight
//   forward         query   key       value        -            -            softmax_j(scale s_ij)
//   value gradient  key     query     grad_output  -            -            p = exp(scale s_ij - logsumexp_j)
//   query gradient  query   key       key          grad_output  value        p_ij (left_i . right_j - delta_i)
//   key gradient    key     query     query        value        grad_output  p_ij (left_i . right_j - delta_j)
struct SimtParams {
  Operand owned;         // (B, E, owned_positions)
  Operand streamed;      // (B, E, streamed_positions)
  Operand values;        // (B, out_channels, streamed_positions)
  Operand left;          // (B, C, owned_positions)
  Operand right;         // (B, C, streamed_positions)
  void* output;          // (B, out_channels, owned_positions), contiguous
  void* output_low;      // forward of 16-bit types: what rounding took from the output, like it; null: not wanted
  const void* mean_key;  // query gradient of float32: (B, E, owned_positions), sum_j p_ij key_j
  void* logsumexp;       // accumulator type; written by forward, else read: of the queries
  const void* delta;     // accumulator type, of the queries
  int64_t batch;
  int owned_positions;
  int streamed_positions;
  int key_channels;    // E
  int value_channels;  // C
  int out_channels;    // C forward and for the value gradient, E for the other two
  double scale;
  int owned_blocks;
  int channel_blocks;
};

}  // namespace segattn::cuda
