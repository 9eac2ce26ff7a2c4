// What the channel attention kernels are told: plain structs, filled by the host code, copied at the launch.
#pragma once

#include <cstdint>

#include "cuda/common/operand.h"

namespace segattn::cuda {

// energies[s, b, c, k] = sum over split s's positions of left[b, c, n] right[b, k, n], float32 for 16-bit operands.
struct GramParams {
  Operand left;     // (B, C, N), rows on 16 bytes
  Operand right;    // (B, K, N), rows on 16 bytes
  float* energies;  // (splits, B, C, K)
  int64_t batch;
  int left_channels;   // C
  int right_channels;  // K
  int positions;       // N
  int left_tiles;
  int right_tiles;
  int tile_pairs;  // of a sample: all of them, or one triangle where left is right
  int symmetric;
  int splits;
  int positions_per_split;  // a multiple of the tile's
};

// A = softmax_k(scale * E_ck) and the log-sum-exp, E = sum of the splits, in order. With gamma, gamma A is stored for A,
// and in 16 bits gamma A + I (see with_gamma).
struct ChannelSoftmaxParams {
  void* energies;     // (splits, B * C, K), accumulator type; split 0 becomes the sum
  void* attention;    // (B * C, K)
  void* logsumexp;    // (B * C), accumulator type
  const void* gamma;  // (B * C), accumulator type, C = K; or null
  int64_t split_stride;
  int splits;
  int keys;  // K
  double scale;
};

// From the energies again and dA = dO V^T: A, and dE = scale * A (dA - sum_k A dA), the gradient of the energies. With
// gamma, gamma A (+ I) for A as in the forward pass, and gamma dA for dA.
struct ChannelSoftmaxBackwardParams {
  void* energies;        // (energy_splits, B * C, K), accumulator type; split 0 becomes the sum
  void* grad_attention;  // (grad_splits, B * C, K), accumulator type; split 0 becomes dE
  void* attention;       // (B * C, K), rows of `pitch` elements
  void* grad_energies;   // (B * C, K), rows of `pitch` elements; null where split 0 is enough
  const void* gamma;     // (B * C), accumulator type, C = K; or null
  void* grad_gamma;      // (B * C), accumulator type: sum_k A dA; or null
  int64_t split_stride;
  int energy_splits;
  int grad_splits;
  int keys;
  int pitch;
  double scale;
};

// result = m + m^T for the (C, C) matrices of a batch.
struct SymmetriseParams {
  const void* matrix;  // (B, C, C), accumulator type
  void* result;        // (B, C, C), rows of `pitch` elements
  int channels;
  int pitch;
  int tiles;  // 32 x 32 ones of a row of the matrix
};

// output[b, c, n] = sum_k attention[b, k, c] grad_output[b, k, n] + symmetric[b, k, c] input[b, k, n]: A^T dO + (dE + dE^T) X
// in one pass, with one rounding.
struct ChannelCombineParams {
  Operand attention;    // (B, C, C), rows on 16 bytes
  Operand symmetric;    // (B, C, C), rows on 16 bytes
  Operand grad_output;  // (B, C, N), rows on 16 bytes
  Operand input;        // (B, C, N), rows on 16 bytes
  void* output;         // (B, C, N), contiguous
  int channels;
  int positions;
  int channel_tiles;
  int position_tiles;
};

// target[i] += other[i] + another[i]
struct AddParams {
  void* target;
  const void* other;
  const void* another;  // or null
  int64_t elements;
};

}  // namespace segattn::cuda
