// Parameters of the criss-cross kernels: plain structs, filled by the host code and passed by value at launch.
//
// A line is a row or a column of the image; every position attends to the positions of its line. Rows and columns
// differ only in their strides, so the same kernels serve both directions. Strides are in elements and arbitrary.
#pragma once

#include <cstdint>

namespace segattn::cuda {

enum class Direction { kRows, kColumns };

// The largest stride within a sample, in elements: the kernels multiply it by up to 4 in 32 bits.
constexpr int64_t kMaxLineStride = (int64_t(1) << 29) - 1;

// (B, channels, lines, positions)
struct LineFeatures {
  void* data;
  int64_t batch_stride;
  int channel_stride;  // up to kMaxLineStride, as are the next two
  int line_stride;
  int position_stride;
  int channels;
  bool paired;  // 16-bit types: lines 2i and 2i + 1 both exist and share an aligned 32-bit word
};

// One direction of an affinity or attention tensor (B, H + W - 1, H, W): an entry for each query and each key of its
// line. Key k is channel first_channel + k. Columns skip the query's own position: key k after it is channel
// first_channel + k - 1.
struct LineAffinity {
  void* data;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t line_stride;
  int64_t position_stride;
  int first_channel;  // 0 for rows, W for columns
};

// One number per query: logsumexp, delta or grad_sum. (B, lines, positions), accumulator type.
struct LineScalars {
  void* data;
  int64_t batch_stride;
  int64_t line_stride;
  int64_t position_stride;
};

// Energies may be in the thousands. A weight exp(energy - logsumexp) then needs more of the logsumexp than its rounded
// value.
struct LineLogsumexp : LineScalars {
  void* low;  // the rounding error of the value, with the same strides; null: not given
};

// The lines of a batch and their partition into blocks.
struct Lines {
  int64_t batch;
  int count;        // lines per sample
  int length;       // positions per line
  bool skips_self;  // columns: the query's own position already counts in its row
  int pairs;        // pairs of lines per block
  int line_blocks;
  int owned;  // positions owned by a block
  int owned_blocks;
};

// logsumexp over the line of the energies scale * query . key
struct LineStatisticsParams {
  Lines lines;
  LineFeatures query;  // (B, E, lines, length)
  LineFeatures key;    // (B, E, lines, length)
  LineLogsumexp logsumexp;
  double scale;
  bool accumulate;  // merges with the other direction's logsumexp, which `logsumexp` holds
};

// affinity[q, k] = query_side[:, q] . key_side[:, k]
struct LineProductParams {
  Lines lines;
  LineFeatures query_side;  // (B, any number of channels, lines, length)
  LineFeatures key_side;    // same shape
  LineAffinity affinity;
};

// The weight of query q and key k of a line in line_sum_kernel:
enum class LineWeight {
  kGiven,     // given_weights[q, k]
  kSoftmax,   // p = exp(scale * query_q . key_k - logsumexp_q)
  kGradient,  // scale * p * (grad_output_q . value_k - delta_q), the gradient of query_q . key_k
};

// The side whose positions a block owns and computes the sums of.
enum class LineOwner { kQueries, kKeys };

//   out[:, i] (+)= sum_j weight(i, j) values[:, j]
// over the positions j of i's line. i is the query and j the key, or i the key and j the query (LineOwner::kKeys):
//                            owner   weight              values
//   aggregation              query   kGiven(attention)   value
//   its value gradient       key     kGiven(attention)   grad_output
//   affinity's gradients     query   kGiven(grad)        key
//                            key     kGiven(grad)        query
//   criss-cross attention    query   kSoftmax            value
//   its value gradient       key     kSoftmax            grad_output
//   its query gradient       query   kGradient           key
//   its key gradient         key     kGradient           query
//   mean_key                 query   kSoftmax            key
struct LineSumParams {
  Lines lines;
  LineAffinity given_weights;  // kGiven
  LineFeatures query;          // kSoftmax, kGradient
  LineFeatures key;
  LineFeatures grad_output;  // kGradient
  LineFeatures value;
  LineLogsumexp logsumexp;  // kSoftmax, kGradient
  LineScalars delta;        // kGradient: sum_c grad_output * output
  LineScalars grad_sum;     // kGradient, LineOwner::kQueries: (+)= sum_j weight(i, j)
  LineFeatures values;      // the summands
  LineFeatures output;
  double scale;
  int weight_rows;         // queries of the weights in shared memory
  int weight_columns;      // their keys, a multiple of 16
  bool accumulate;         // adds to the other direction's result, which `output` holds
  int positions_per_pass;  // contracted positions whose weights are in shared memory at once: all or a multiple of 64
  int channel_groups;      // blocks among which the channels of the output are divided
  int channels_per_group;  // a multiple of kLineChannels
};

// Criss-cross attention over one direction, for lines whose weights fit in shared memory. Writes the output and
// logsumexp of this direction or, with `accumulate`, of both: `output` then holds the other direction's.
struct LineAttentionParams : LineSumParams {
  LineLogsumexp other_logsumexp;  // of the other direction, for `accumulate`
};

// Several gradients of criss-cross attention at once, for lines whose weights fit in shared memory. `values` and
// `output` are not used.
struct LineBackwardParams : LineSumParams {
  LineFeatures grad_query;  // before the correction (correction.cuh); of each of the three, data null: not needed
  LineFeatures grad_key;
  LineFeatures grad_value;
};

}  // namespace segattn::cuda
