// Computes the weights of a block's queries and keys in shared memory, and weighted sums with them.
#pragma once

#include <bit>

#include "cuda/criss_cross/line_block.cuh"

namespace segattn::cuda {

// Whether storing the sums scales them to the softmax over both directions.
enum class MergeScale { kNone, kFactors };

template <class Arithmetic, class Shape>
struct LineWeights {
  using Block = LineBlock<Arithmetic, Shape>;
  using T = typename Arithmetic::Element;
  using Word = LineWord<T>;
  using Real = typename Arithmetic::Real;
  using Products = typename Block::Products;
  static constexpr int kTile = Shape::kTile;

  const LineSumParams& p;
  Block block;
  int first_query, first_key;  // of the weights in shared memory

  static __host__ __device__ constexpr int weights_pitch(int columns) { return columns + 8; }
  static __host__ __device__ constexpr int staging_bytes(int plane_bits) {
    const int words = plane_words<Shape>(plane_bits, kLineChannels) + plane_padding(plane_bits);
    return static_cast<int>(sizeof(Word)) * words << plane_bits;
  }
  static constexpr size_t shared_bytes(int pairs, int queries, int keys) {
    const int plane_bits = std::bit_width(static_cast<unsigned>(pairs * 2 / kLinesPerPlane<T>)) - 1;
    return staging_bytes(plane_bits) + sizeof(T) * 2 * pairs * queries * weights_pitch(round_up(keys, 16));
  }

  __device__ __forceinline__ LineWeights(const LineSumParams& params, Word* shared)
      : p(params), block(p.lines, shared, p.channel_groups) {
    first_query = first_key = 0;
  }

  // The weights of the next pass start at contracted position `first`.
  template <LineOwner kOwner>
  __device__ __forceinline__ void start_pass(int first) {
    first_query = kOwner == LineOwner::kKeys ? first : block.owned_begin;
    first_key = kOwner == LineOwner::kKeys ? block.owned_begin : first;
  }

  // the group of output channels that the block computes
  __device__ __forceinline__ int channel_group() const {
    return rematerialize(static_cast<int>(blockIdx.x)) % p.channel_groups;
  }
  __device__ __forceinline__ int channel_end(const LineFeatures& values) const {
    return min((channel_group() + 1) * p.channels_per_group, values.channels);
  }

  __device__ __forceinline__ int pitch() const { return weights_pitch(p.weight_columns); }
  // The weights of a line: [p.weight_rows queries][pitch() keys], after the staging memory, whose size is a multiple
  // of 16 bytes for any number of planes.
  __device__ __forceinline__ T* weights_of(int line) const {
    unsigned char* weights = reinterpret_cast<unsigned char*>(block.staging) + staging_bytes(block.window.plane_bits);
    return reinterpret_cast<T*>(weights) + line * p.weight_rows * pitch();
  }
  // MergeScale::kFactors: two factors per query, for the query's own sum and for the other direction's result. Both are
  // [2 * pairs lines][factor_pitch() queries], after the weights of all lines. A warp's columns are 16: factors of
  // queries that the block does not own fill the last of them.
  static constexpr size_t factor_bytes(int pairs, int queries) {
    return 2 * sizeof(Real) * 2 * pairs * round_up(queries, 16);
  }
  __device__ __forceinline__ int factor_pitch() const { return round_up(p.weight_rows, 16); }
  __device__ __forceinline__ Real* own_factors() const { return factors(0); }
  __device__ __forceinline__ Real* other_factors() const { return factors(1); }

  // visit(line, query, half) for the lane's queries among the warp's 16 from query0 + 16 rank on
  template <class Visit>
  __device__ __forceinline__ void for_queries(int query0, const Visit& visit) const {
    const int g = Block::lane_row();
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        visit(line, query0 + 16 * block.rank() + g + 8 * half, half);
      }
    }
  }

  __device__ __forceinline__ bool query_exists(int line, int q) const {
    return q < p.lines.length && block.first_line() + line < block.window.line_end;
  }

  // visit(pair of weights, 8-key tile, first key) for the lane's pairs of keys whose weights are in shared memory
  template <class Visit>
  __device__ __forceinline__ void for_keys(int line, int q, int key0, const Visit& visit) const {
    const int row = q - first_query, column = 2 * Block::lane_column();
    if (row >= p.weight_rows) {
      return;
    }
    T* const elements = weights_of(2 * block.pair() + line) + row * pitch() + key0 - first_key + column;
    const int columns = p.weight_columns - (key0 - first_key);
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
      if (8 * j < columns) {
        visit(elements + 8 * j, j, key0 + column + 8 * j);
      }
    }
  }

  // weights = exp(scale * query . key - logsumexp)
  __device__ __forceinline__ void compute_weights(int query0, int key0) {
    Products d;
    block.multiply_features(d, p.query, p.key, query0, key0);
    for_queries(query0, [&](int line, int q, int half) {
      const Logsumexp<Real> logsumexp =
          query_exists(line, q) ? block.logsumexp(p.logsumexp, line, q) : Logsumexp<Real>{};
      const auto keys = block.attended(line, q);
      for_keys(line, q, key0, [&](T* element, int j, int k) {
        Real weights[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          weights[e] = keys.contain(k + e)
              ? line_exp(
                    shifted_energy(d[line][j][2 * half + e], static_cast<Real>(p.scale), logsumexp.value),
                    logsumexp.low)
              : Real(0);
        }
        store_pair(element, weights[0], weights[1]);
      });
    });
  }

  // Overwrites the weights with the gradients of the energies, times scale (LineWeight::kGradient). Each thread
  // overwrites the weights that it has stored itself, so no barrier is needed. d = grad_output(:, q) . value(:, k)
  __device__ __forceinline__ void replace_by_energy_gradients(const Products& d, int query0, int key0) {
    for_queries(query0, [&](int line, int q, int half) {
      const Real delta = query_exists(line, q) ? *block.scalar(p.delta, line, q) : Real(0);
      for_keys(line, q, key0, [&](T* element, int j, int) {
        Real gradients[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // Beyond the edges the product is 0 and delta may not be, but the weight is 0.
          gradients[e] = static_cast<Real>(p.scale) * to_accumulator(element[e]) * (d[line][j][2 * half + e] - delta);
        }
        store_pair(element, gradients[0], gradients[1]);
      });
    });
  }

  __device__ __forceinline__ void compute_energy_gradients(int query0, int key0) {
    Products d;
    block.multiply_features(d, p.grad_output, p.value, query0, key0);
    replace_by_energy_gradients(d, query0, key0);
  }

  // grad_sum (+)= the energy gradients of each query, summed over the keys in shared memory. Reads the rounded
  // gradients, as the products do; the warp has stored them itself. A lane sums a whole row of either line: this is a
  // separate pass because the computation of the gradients leaves no registers for the sums.
  __device__ __forceinline__ void sum_energy_gradients(const LineScalars& grad_sum, bool accumulate) const {
    constexpr int kElements = sizeof(uint4) / sizeof(T);
    __syncwarp();
    const int lane = Block::lane(), line = lane / 16;
    for (int row = 16 * block.rank() + lane % 16; row < p.weight_rows; row += kTile) {
      const int q = first_query + row;
      if (!query_exists(line, q) || q >= block.owned_end()) {
        return;
      }
      const T* gradients = weights_of(2 * block.pair() + line) + row * pitch();
      Real sums[4] = {};
#pragma unroll 2
      for (int k = 0; k < p.weight_columns; k += kElements) {
        const uint4 words = *reinterpret_cast<const uint4*>(gradients + k);
        const T* elements = reinterpret_cast<const T*>(&words);
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          sums[e % 4] += to_accumulator(elements[e]);
        }
      }
      const Real sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      Real* total = block.scalar(grad_sum, line, q);
      *total = accumulate ? *total + sum : sum;
    }
  }

  // Copies the given weights to shared memory. Neighbouring threads read neighbouring addresses.
  __device__ __forceinline__ void copy_given_weights() {
    __syncthreads();
    const bool lines_are_innermost = lines_innermost(p.given_weights);
    const int lines = 2 * p.lines.pairs, per_key = lines * p.weight_rows, total = p.weight_columns * per_key;
    const T* data = static_cast<const T*>(p.given_weights.data) + block.window.sample * p.given_weights.batch_stride;
    for (int item = static_cast<int>(threadIdx.x); item < total; item += static_cast<int>(blockDim.x)) {
      const int column = item / per_key, rest = item - column * per_key;
      const int local = lines_are_innermost ? rest % lines : rest / p.weight_rows;
      const int row = lines_are_innermost ? rest / lines : rest - local * p.weight_rows;
      const int line = block.window.first_line + local, q = first_query + row, k = first_key + column;
      T weight = from_accumulator<T>(0);
      if (q < p.lines.length && k < p.lines.length && line < block.window.line_end && !(p.lines.skips_self && q == k)) {
        const int channel = p.given_weights.first_channel + k - (p.lines.skips_self && k > q);
        weight = data
            [channel * p.given_weights.channel_stride + line * p.given_weights.line_stride +
             q * p.given_weights.position_stride];
      }
      weights_of(local)[row * pitch() + column] = weight;
    }
  }

  // visit(first query, first key) for the weights in shared memory, tile by tile
  template <class Visit>
  __device__ __forceinline__ void for_tiles(const Visit& visit) {
    for (int q = 0; q < p.weight_rows; q += kTile) {
      for (int k = 0; k < p.weight_columns; k += kTile) {
        visit(first_query + q, first_key + k);
      }
    }
  }

  // A warp's sums of 16 kRows channels for the 16-column tiles rank, rank + kWarps, ... of the block's owned positions:
  // [line][16 channels][8 positions][element].
  static constexpr int kOwnedTiles = kMaxOwned / kTile;
  template <int kRows, int kTiles>
  using Sums = Real[2][kRows][2 * kTiles][4];

  // sums += values * weights over the staged positions, of which `positions` exist. The first is position `offset` of
  // the weights.
  template <LineOwner kOwner, int kRows, int kTiles>
  __device__ __forceinline__ void add_staged(Real (&sums)[2][kRows][2 * kTiles][4], int offset, int positions) {
    const int columns = kOwner == LineOwner::kKeys ? p.weight_columns : p.weight_rows, column = 16 * block.rank();
    if (column >= columns) {
      return;
    }
    const int lane = Block::lane();
    auto values = Arithmetic::a_channels(block.tile(block.staging, 16 * kRows), lane);
    const T* weights = weights_of(2 * block.pair()) + (kOwner == LineOwner::kKeys ? column : offset);
    const int other_line = rematerialize(p.weight_rows) * pitch();
    int rows[kTiles][Arithmetic::kWeightRows];
    if constexpr (kOwner == LineOwner::kQueries) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        Arithmetic::query_rows(rows[i], lane, pitch(), column + kTile * i, p.weight_rows - 1);
      }
    }
    const int steps = min(positions, kTile);
#pragma unroll 1
    for (int j = 0; j < steps; j += Arithmetic::kStep) {
      typename Arithmetic::A a[kRows][2];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        Arithmetic::load_a_channels(a[m], values, 16 * m);
      }
      values = values.from(0, Arithmetic::kStep);
      if constexpr (kOwner == LineOwner::kKeys) {
        Arithmetic::key_rows(rows[0], lane, pitch(), offset + j, p.weight_rows - 1);
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (column + kTile * i < rematerialize(columns)) {
#pragma unroll
          for (int line = 0; line < 2; ++line) {
            typename Arithmetic::B b;
            if constexpr (kOwner == LineOwner::kKeys) {
              Arithmetic::load_b_keys(b, weights + line * other_line + kTile * i, rows[0]);
            } else {
              Arithmetic::load_b_queries(b, weights + line * other_line + j, rows[i]);
            }
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
              Arithmetic::multiply(sums[line][m][2 * i], a[m][line], b, 0);
              Arithmetic::multiply(sums[line][m][2 * i + 1], a[m][line], b, 1);
            }
          }
        }
      }
    }
  }

  struct alignas(2 * sizeof(Real)) FactorPair {
    Real left, right;
  };

  // output(:, owned) (+)= sums, scaled by the factors for MergeScale::kFactors. The sums go through the staging memory
  // so that neighbouring threads write neighbouring elements.
  template <MergeScale kScale, int kRows, int kTiles>
  __device__ __forceinline__ void store_sums(
      const Real (&sums)[2][kRows][2 * kTiles][4], const LineFeatures& output, int channel, int channel_end,
      bool accumulate) {
    const int g = Block::lane_row(), t = Block::lane_column();
    const int column = 16 * block.rank() + 2 * t;  // the lane's first
    const int pitch = plane_words<Shape>(block.window.plane_bits, 16 * kRows);
    Word* const target = block.staging + block.plane() * pitch + g * Shape::kPitch + column;
    const FactorPair* const scales =
        reinterpret_cast<const FactorPair*>(own_factors() + 2 * block.pair() * factor_pitch() + column);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int first = i * kTile;
      if (first >= p.lines.owned) {
        break;
      }
      __syncthreads();
      if (first + column < round_up(p.lines.owned, 16)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // left and right columns of a 16 x 16 tile
          FactorPair scale[2] = {{1, 1}, {1, 1}};
          if constexpr (kScale == MergeScale::kFactors) {
            scale[0] = scales[(first + 8 * half) / 2];
            scale[1] = scales[(first + 8 * half + factor_pitch()) / 2];
          }
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
#pragma unroll
            for (int e = 0; e < 4; e += 2) {  // rows g and g + 8
              const Real(&low)[4] = sums[0][m][2 * i + half];
              const Real(&high)[4] = sums[1][m][2 * i + half];
              const Real values[2][2] = {
                  {scale[0].left * low[e], scale[0].right * low[e + 1]},
                  {scale[1].left * high[e], scale[1].right * high[e + 1]}};
              store_results<T>(target + (16 * m + e * 4) * Shape::kPitch + 8 * half, pitch, values);
            }
          }
        }
      }
      __syncthreads();
      const LineMerge<T> merge{accumulate, kScale == MergeScale::kFactors ? other_factors() : nullptr, factor_pitch()};
      store_line_tile<T, Shape, 16 * kRows>(
          block.staging, output, block.window, channel, channel_end, block.owned_begin + first, block.owned_end(),
          merge, first);
    }
  }

  static constexpr int kSumRows = kLineChannels / 16;
  using ChannelSums = Sums<kSumRows, kOwnedTiles>;  // of kLineChannels channels

  // sums += values * weights for the channels from `channel` on, over the contracted positions [first, end). The
  // weights in shared memory start at `first`.
  template <LineOwner kOwner>
  __device__ __forceinline__ void add_values(
      ChannelSums& sums, const LineFeatures& values, int channel, int first, int end) {
    for (int j = first; j < end; j += kTile) {
      __syncthreads();
      load_line_tile<T, Shape, kLineChannels>(block.staging, values, block.window, channel, j, end);
      __syncthreads();
      add_staged<kOwner, kSumRows, kOwnedTiles>(sums, j - first, end - j);
    }
  }

  // output(:, owned) (+)= values(:, contracted) * weights over the contracted positions [first, end). The weights in
  // shared memory start at `first`. Scaled as in store_sums.
  template <LineOwner kOwner, MergeScale kScale = MergeScale::kNone>
  __device__ __forceinline__ void sum_values(
      const LineFeatures& values, const LineFeatures& output, int first, int end, bool accumulate) {
    int channel = channel_group() * p.channels_per_group, last = 0;
    do {
      ChannelSums sums = {};
      add_values<kOwner>(sums, values, channel, first, end);
      last = channel_end(values);  // not earlier: a division, but add_values has no register for it
      store_sums<kScale, kSumRows, kOwnedTiles>(sums, output, channel, last, accumulate);
      channel += kLineChannels;
    } while (channel < last);
  }

 private:
  __device__ __forceinline__ Real* factors(int index) const {
    const int lines = 2 * p.lines.pairs;
    const int offset = staging_bytes(block.window.plane_bits) +
        static_cast<int>(sizeof(T)) * lines * p.weight_rows * pitch() +
        static_cast<int>(sizeof(Real)) * index * lines * factor_pitch();
    return reinterpret_cast<Real*>(reinterpret_cast<unsigned char*>(block.staging) + rematerialize(offset));
  }
};

}  // namespace segattn::cuda
