// Parameters of the channel attention kernels: plain structs that the host code fills and the launch copies.
#pragma once

#include <cstdint>

#include "cuda/common/operand.h"

namespace segattn::cuda {

// products[s, b, c, k] = sum over n in split s of left[b, c, n] right[b, k, n]: float32 products of 16-bit operands.
struct GramParams {
  Operand left;     // (B, C, N), rows on 16 bytes
  Operand right;    // (B, K, N), rows on 16 bytes
  float* products;  // (splits, B, C, K)
  int64_t batch;
  int left_channels;   // C
  int right_channels;  // K
  int positions;       // N
  int left_tiles;
  int right_tiles;
  int tile_pairs;  // of a sample: all pairs, or those of one triangle if symmetric
  bool symmetric;  // left is right
  int splits;
  int positions_per_split;  // a multiple of the tile's
};

// result = the splits of the products, added in order.
struct SumSplitsParams {
  const float* products;  // (splits, elements)
  float* result;          // (elements)
  int64_t elements;
  int splits;
};

// weights = softmax_k(scale * products[c, k]) and logsumexp, with the splits of the products added in order. With
// gamma, gamma * weights is stored instead, and for 16-bit types gamma * weights + I (see with_gamma).
struct ChannelSoftmaxParams {
  void* products;     // (splits, B * C, K), accumulator type; split 0 receives the sum, a single split is only read
  void* weights;      // (B * C, K)
  void* logsumexp;    // (B * C), accumulator type
  const void* gamma;  // (B * C), accumulator type, C = K; or null
  int64_t split_stride;
  int splits;
  int keys;  // K
  double scale;
};

// Recomputes the weights A from the products, and computes dE = scale * A (dA - sum_k A dA), the gradient of the
// products, from dA = dO V^T. With gamma, stores gamma A (+ I) for A as in the forward pass, and uses gamma dA for dA.
struct ChannelSoftmaxBackwardParams {
  void* products;       // (product_splits, B * C, K), accumulator type; split 0 as above
  void* grad_weights;   // (grad_splits, B * C, K), accumulator type; split 0 receives the sum, or dE in place of it
  void* weights;        // (B * C, K), rows of `pitch` elements
  void* grad_products;  // dE (B * C, K), rows of `pitch` elements; or null
  const void* gamma;    // (B * C), accumulator type, C = K; or null
  void* grad_gamma;     // (B * C), accumulator type: sum_k A dA; or null
  int64_t split_stride;
  int product_splits;
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
  int tiles;  // 32 x 32 tiles along a row of the matrix
};

// result = matrix / factor in 16 bits, with the factor of a row the power of two above the sum of its magnitudes.
struct NormaliseRowsParams {
  const float* matrix;  // (rows, columns)
  void* result;         // (rows, columns)
  float* factors;       // (rows)
  int columns;
};

// target[row, n] *= factors[row]
struct ScaleRowsParams {
  void* target;          // (rows, positions)
  const float* factors;  // (rows)
  int positions;
  int row_blocks;  // of a row
};

// grad_input[b, c, n] = sum_k weights[b, k, c] grad_output[b, k, n] + symmetric[b, k, c] input[b, k, n], which is
// A^T dO + (dE + dE^T) X, in one pass and with one rounding.
struct InputGradientParams {
  Operand weights;      // (B, C, C), rows on 16 bytes
  Operand symmetric;    // dE + dE^T (B, C, C), rows on 16 bytes
  Operand grad_output;  // (B, C, N), rows on 16 bytes
  Operand input;        // (B, C, N), rows on 16 bytes
  void* grad_input;     // (B, C, N), contiguous
  int channels;
  int positions;
  int channel_tiles;
  int position_tiles;
};

// target[i] += first[i] + second[i]
struct AddParams {
  void* target;
  const void* first;
  const void* second;  // or null
  int64_t elements;
};

}  // namespace segattn::cuda
