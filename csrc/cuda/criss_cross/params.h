// What the criss-cross kernels are told: plain structs, filled by the host code, copied at the launch.
//
// A line is a row or a column of the image; each position of it attends to the line's positions. Rows and columns differ
// in the strides alone, so the same kernels serve both: what a line's index and a position's index are worth in memory
// is in the operands. Strides are in elements and arbitrary.
#pragma once

#include <cstdint>

namespace segattn::cuda {

enum class Direction { kRows, kColumns };

// (B, channels, lines, positions)
struct LineFeatures {
  void* data;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t line_stride;
  int64_t position_stride;
  int channels;
  int paired;  // 16-bit: there are lines 2i + 1 for all lines 2i, their neighbours in an aligned 32-bit word
};

// A line's map of queries and keys in CCNet's layout, (B, H + W - 1, lines, queries): key k is channel first + k, after
// the query's own position, which columns skip, first + k - 1.
struct LineMap {
  void* data;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t line_stride;
  int64_t position_stride;
  int first;  // 0 for rows, W for columns
};

// A number for each query: logsumexp, delta, grad_sum. (B, lines, positions), accumulator type.
struct LineScalars {
  void* data;
  int64_t batch_stride;
  int64_t line_stride;
  int64_t position_stride;
};

// The lines of a batch, and how they are cut into blocks.
struct Lines {
  int64_t batch;
  int count;       // lines of a sample
  int length;      // positions of a line
  int skips_self;  // columns: the query's own position counts in its row
  int pairs;       // pairs of lines a block takes
  int line_blocks;
  int owned;  // owned positions a block takes
  int owned_blocks;
};

// logsumexp over the line of scale * query . key
struct LineStatisticsParams {
  Lines lines;
  LineFeatures query;  // (B, E, lines, length)
  LineFeatures key;    // (B, E, lines, length)
  LineScalars logsumexp;
  double scale;
  int merges;  // with what `logsumexp` holds, the other direction's
};

// map[q, k] = query_side[:, q] . key_side[:, k]
struct LineProductParams {
  Lines lines;
  LineFeatures query_side;  // (B, any channels, lines, length)
  LineFeatures key_side;    // likewise
  LineMap map;
};

// What weighs the values in line_sum_kernel, for query q and key k of a line:
enum class LineWeight {
  kGiven,     // map[q, k]
  kSoftmax,   // p = exp(scale * query_q . key_k - logsumexp_q)
  kGradient,  // scale * p * (grad_output_q . value_k - delta_q), the gradient of the energy
};

// The side whose positions a block owns, and whose sums it computes.
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
  LineMap map;         // kGiven
  LineFeatures query;  // kSoftmax, kGradient
  LineFeatures key;
  LineFeatures grad_output;  // kGradient
  LineFeatures value;
  LineScalars logsumexp;  // kSoftmax, kGradient
  LineScalars delta;      // kGradient: sum_c grad_output output
  LineScalars grad_sum;   // kGradient, owner query: (+)= sum_j weight(i, j)
  LineFeatures values;    // what is summed
  LineFeatures output;
  double scale;
  int map_rows;  // queries and keys (a multiple of 16) of the weights in shared memory
  int map_columns;
  int accumulate;          // adds to what `output` holds, the other direction's
  int part;                // contracted positions whose weights shared memory holds at once: all, or a multiple of 64
  int channel_groups;      // blocks the channels of the output are shared among
  int channels_per_group;  // a multiple of kLineChannels
};

// Criss-cross attention over one direction, for queries whose weights fit shared memory: query, key, values, output and
// logsumexp are its own or, with `accumulate`, of both directions, where output holds the other's.
struct LineAttentionParams : LineSumParams {
  LineScalars other;  // `accumulate`: the other direction's log-sum-exp
};

// All three gradients of criss-cross attention at once, for lines whose map fits shared memory; `values` and `output` are
// not used.
struct LineBackwardParams : LineSumParams {
  LineFeatures grad_query;  // before its correction
  LineFeatures grad_key;
  LineFeatures grad_value;
};

}  // namespace segattn::cuda
