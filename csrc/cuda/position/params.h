// Parameters of the position attention kernels: plain structs that the host code fills and the launch copies.
//
// Positions are counted in int (a feature map has fewer than 2^31); whatever indexes memory is int64_t. Operands are
// channels-first with a row for each channel; strides are in elements. Tensor-core kernels need rows that start on 16
// bytes.
#pragma once

#include <cstdint>

#include "cuda/common/operand.h"

namespace segattn::cuda {

constexpr int kMaxSplits = 16;  // of the streamed positions

// The keys of a sample that take part: all, or the first key_counts[sample] (kept_keys.cuh). Separate instances:
// without a key padding mask, the bound is a launch parameter and takes no register.
enum class Keys { kAll, kKept };

// Gradients of query and key: whether grad_output passes through shared memory for every tile, or stays there for all
// tiles of a query block.
enum class GradOutput { kStreamed, kResident };

// out[c, i] = sum_j weight(i, j) values[c, j]: a block owns positions i and streams all positions j. With the energy
// e_ij = scale * owned_i . streamed_j:
//                   owned   streamed  values       weight
//   forward         query   key       value        softmax_j(e_ij)
//   value gradient  key     query     grad_output  exp(e_ij - logsumexp_j)
struct WeightedSumParams {
  Operand owned;     // (B, E, owned_positions)
  Operand streamed;  // (B, E, streamed_positions)
  Operand values;    // (B, C, streamed_positions)
  void* output;  // (B, C, owned_positions), contiguous, of the operands' type; with to_partials, each split's result:
                 // (splits, tiles, channels of a tile, positions of a tile), float32
  void* output_low;  // forward of 16-bit types: the output's rounding error, like output; null: not written
  float* logsumexp;  // forward: written, (B, owned_positions), with to_partials (splits, tiles, positions of a tile);
                     // value gradient: read, (B, streamed_positions)
  int owned_positions;
  int streamed_positions;
  int key_channels;    // E
  int value_channels;  // C
  float scale;
  // Forward: the energies in base 2 are q.k * scale_log2, but for the sign of scale. scale_log2 is |scale| * log2(e)
  // rounded to float32, at least the smallest number above 0, so that masked energies stay -inf. ln2 + ln2_low is
  // |scale| / scale_log2, ln(2) but for that rounding: the factor of the logsumexp in base 2.
  float scale_log2;
  float ln2, ln2_low;
  int owned_blocks;
  int channel_blocks;
  // The output tiles of this launch, in the order of channel blocks, owned blocks, samples.
  int first_tile;
  int tiles;
  int splits;
  int steps_per_split;    // streamed tiles of a split
  const int* key_counts;  // forward with Keys::kKept: (B)
  float* logsumexp_low;   // float32: the rounding error of logsumexp, like it
  bool to_partials;       // also of one split
};

// Partial gradients of query and key. A block processes one group of key blocks and one range of query blocks. Each
// group has its own partial of grad_query and each range its own partial of grad_key; sum_partials_kernel adds them in
// a fixed order. For float32 it also adds the partials of grad_query's correction (query_key_gradient.cuh).
struct QueryKeyGradientParams {
  Operand query;               // (B, E, N)
  Operand key;                 // (B, E, M)
  Operand value;               // (B, C, M)
  Operand grad_output;         // (B, C, N)
  const float* logsumexp;      // (B, N)
  const float* delta;          // (B, N): sum_c grad_output output
  float* grad_query_partials;  // (groups, B, E, padded_queries), without scale
  float* grad_key_partials;    // (ranges, B, E, padded_keys), without scale
  float* mean_key_partials;    // float32: (groups, B, E, padded_queries), sum_j P_ij key_j
  float* grad_sum_partials;    // float32: (groups, B, padded_queries), sum_j dS_ij
  int64_t batch;
  int queries;
  int keys;
  int padded_queries;  // multiples of the tile, so that the partials have no edges
  int padded_keys;
  int key_channels;    // E
  int value_channels;  // C
  float scale;
  int query_blocks, ranges, blocks_per_range;
  int key_blocks, groups, blocks_per_group;
  const int* key_counts;       // Keys::kKept: (B)
  const float* logsumexp_low;  // float32: (B, N), the rounding error of logsumexp
};

enum class PositionSum { kForward, kValueGradient, kQueryGradient, kKeyGradient, kCorrectedQueryGradient };

// The sums of the SIMT kernel have one form, out[c, i] = factor * sum_j weight(i, j) values[c, j]. With the energy
// e_ij = scale * owned_i . streamed_j:
//                   owned   streamed  values       left         right        weight
//   forward         query   key       value        -            -            softmax_j(e_ij)
//   value gradient  key     query     grad_output  -            -            p_ij = exp(e_ij - logsumexp_j)
//   query gradient  query   key       key          grad_output  value        p_ij (left_i . right_j - delta_i)
//   key gradient    key     query     query        value        grad_output  p_ij (left_i . right_j - delta_j)
// The corrected query gradient also subtracts the rounding error of delta (query_key_gradient.cuh).
struct SimtParams {
  Operand owned;         // (B, E, owned_positions)
  Operand streamed;      // (B, E, streamed_positions)
  Operand values;        // (B, out_channels, streamed_positions)
  Operand left;          // (B, C, owned_positions)
  Operand right;         // (B, C, streamed_positions)
  void* output;          // (B, out_channels, owned_positions), contiguous
  void* output_low;      // forward of 16-bit types: the output's rounding error, like output; null: not written
  const void* mean_key;  // corrected query gradient: (B, E, owned_positions), sum_j p_ij key_j
  void* logsumexp;       // accumulator type, of the queries; written by the forward pass, read by the others
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
  const int* key_counts;       // Keys::kKept, queries owned: (B)
  const void* grad_logsumexp;  // corrected query gradient: accumulator type, of the queries; null: zeros
  // The rounding error of logsumexp, like it. Written by the forward pass, unless null. Read by the others for float32
  // and float64: the rounding of 16-bit weights is coarser.
  void* logsumexp_low;
  // Attention over a part of the keys: output has the accumulator type and, forward, is 0 for a query whose energies
  // are all -inf, not NaN.
  bool is_part;
};

}  // namespace segattn::cuda
