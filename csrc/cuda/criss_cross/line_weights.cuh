// A block's weights in shared memory: how they are made, and sums of values by them.
#pragma once

#include <bit>

#include "cuda/criss_cross/line_block.cuh"

namespace segattn::cuda {

// Whether results are scaled to the softmax over both directions when they are stored.
enum class MergeScale { kNone, kFactors };

template <class Arithmetic, class Shape>
struct LineWeights {
  using Block = LineBlock<Arithmetic, Shape>;
  using T = typename Arithmetic::Element;
  using Word = LineWord<T>;
  using Real = typename Arithmetic::Real;
  using Scores = typename Block::Scores;
  static constexpr int kTile = Shape::kTile;

  const LineSumParams& p;
  Block block;
  int first_query, first_key;  // of the map

  static __host__ __device__ constexpr int map_pitch(int columns) { return columns + 8; }
  static __host__ __device__ constexpr int stage_bytes(int plane_bits) {
    const int words = plane_words<Shape>(plane_bits, kLineChannels) + plane_padding(plane_bits);
    return static_cast<int>(sizeof(Word)) * words << plane_bits;
  }
  static constexpr size_t shared_bytes(int pairs, int queries, int keys) {
    const int plane_bits = std::bit_width(static_cast<unsigned>(pairs * 2 / kLinesPerPlane<T>)) - 1;
    return stage_bytes(plane_bits) + sizeof(T) * 2 * pairs * queries * map_pitch(round_up(keys, 16));
  }

  __device__ __forceinline__ LineWeights(const LineSumParams& params, Word* shared)
      : p(params), block(p.lines, shared, p.channel_groups) {
    first_query = first_key = 0;
  }

  // the block's group of channels
  __device__ __forceinline__ int group() const { return opaque(static_cast<int>(blockIdx.x)) % p.channel_groups; }
  __device__ __forceinline__ int channel_end(const LineFeatures& values) const {
    return min((group() + 1) * p.channels_per_group, values.channels);
  }

  __device__ __forceinline__ int pitch() const { return map_pitch(p.map_columns); }
  // [p.map_rows queries][pitch() keys], behind the staging memory, which is a multiple of 16 bytes for any number of planes
  __device__ __forceinline__ T* line_map(int line) const {
    unsigned char* maps = reinterpret_cast<unsigned char*>(block.stage) + stage_bytes(block.window.plane_bits);
    return reinterpret_cast<T*>(maps) + line * p.map_rows * pitch();
  }
  // [2 * pairs lines][p.map_rows queries], behind the maps of all lines, where the kernel has two factors a query: what
  // its sum, and what the result it is added to, is multiplied with
  __device__ __forceinline__ Real* factors(int which) const {
    const int lines = 2 * opaque(p.lines.pairs);
    return reinterpret_cast<Real*>(line_map(lines)) + which * lines * p.map_rows;
  }

  // The map tile's element of the warp's pair at queries q, keys k and k + 1; nothing outside the tile.
  __device__ __forceinline__ T* map_element(int line, int q, int k) const {
    const int row = q - first_query, column = k - first_key;
    return row < p.map_rows && column < p.map_columns ? line_map(2 * block.pair() + line) + row * pitch() + column
                                                      : nullptr;
  }

  // visit(line, query, half): for the warp's queries, from query0 + 16 rank on
  template <class Visit>
  __device__ __forceinline__ void for_queries(int query0, const Visit& visit) const {
    const int g = opaque(lane_index()) / 4;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        visit(line, query0 + 16 * block.rank() + g + 8 * half, half);
      }
    }
  }

  __device__ __forceinline__ bool inside(int line, int q) const {
    return q < p.lines.length && block.first_line() + line < block.window.line_end;
  }

  // visit(element in the map tile, 8-key tile, first key): for the lane's pairs of keys, those in the map tile
  template <class Visit>
  __device__ __forceinline__ void for_keys(int line, int q, int key0, const Visit& visit) const {
    const int t = opaque(lane_index()) % 4;
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
      const int k = key0 + 8 * j + 2 * t;
      if (T* element = map_element(line, q, k)) {
        visit(element, j, k);
      }
    }
  }

  // map tile = exp(scale * query . key - logsumexp)
  __device__ __forceinline__ void make_softmax(int query0, int key0) {
    Scores d;
    block.multiply_features(d, p.query, p.key, query0, key0);
    for_queries(query0, [&](int line, int q, int half) {
      const Real lse = inside(line, q) ? *block.scalar(p.logsumexp, line, q) : Real(0);
      for_keys(line, q, key0, [&](T* element, int j, int k) {
        Real weights[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          weights[e] = block.sees(line, q, k + e)
              ? line_exp(d[line][j][2 * half + e] * static_cast<Real>(p.scale) - lse)
              : Real(0);
        }
        store_pair(element, weights[0], weights[1]);
      });
    });
  }

  // The weights are in the map tile, put there by this thread; the gradient of the energy takes their place.
  // d = grad_output(:, q) . value(:, k)
  __device__ __forceinline__ void weigh_gradient(const Scores& d, int query0, int key0) {
    for_queries(query0, [&](int line, int q, int half) {
      const Real delta = inside(line, q) ? *block.scalar(p.delta, line, q) : Real(0);
      for_keys(line, q, key0, [&](T* element, int j, int) {
        Real gradients[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // the product beyond the edges is 0, delta may not be: the weight is 0 there
          gradients[e] = static_cast<Real>(p.scale) * to_accumulator(element[e]) * (d[line][j][2 * half + e] - delta);
        }
        store_pair(element, gradients[0], gradients[1]);
      });
    });
  }

  __device__ __forceinline__ void make_gradient(int query0, int key0) {
    Scores d;
    block.multiply_features(d, p.grad_output, p.value, query0, key0);
    weigh_gradient(d, query0, key0);
  }

  // grad_sum (+)= the sum over the map tile's keys of the energies' gradients, which this warp has put there: as the
  // products take them. A pass of its own, since there are no registers for sums where the gradients are made. The first
  // of the four lanes of a query adds up theirs.
  __device__ __forceinline__ void sum_gradients(const LineScalars& grad_sum, bool accumulate) const {
    const int t = opaque(lane_index()) % 4;
    for (int row = 0; row < p.map_rows; row += kTile) {
      for_queries(first_query + row, [&](int line, int q, int) {
        Real sum = 0;
        for (int k = first_key + 2 * t; k < first_key + p.map_columns; k += 8) {
          if (const T* element = map_element(line, q, k)) {
            sum += to_accumulator(element[0]) + to_accumulator(element[1]);
          }
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (t == 0 && inside(line, q) && q < block.owned_end()) {
          Real* total = block.scalar(grad_sum, line, q);
          *total = accumulate ? *total + sum : sum;
        }
      });
    }
  }

  // Copies the given map's part, threads along what is next to each other in memory.
  __device__ __forceinline__ void copy_given() {
    __syncthreads();
    const bool lines_first = p.map.line_stride < p.map.position_stride;
    const int lines = 2 * p.lines.pairs, per_key = lines * p.map_rows, total = p.map_columns * per_key;
    const T* data = static_cast<const T*>(p.map.data) + block.window.sample * p.map.batch_stride;
    for (int item = static_cast<int>(threadIdx.x); item < total; item += static_cast<int>(blockDim.x)) {
      const int column = item / per_key, rest = item - column * per_key;
      const int local = lines_first ? rest % lines : rest / p.map_rows;
      const int row = lines_first ? rest / lines : rest - local * p.map_rows;
      const int line = block.window.first_line + local, q = first_query + row, k = first_key + column;
      T weight = from_accumulator<T>(0);
      if (q < p.lines.length && k < p.lines.length && line < block.window.line_end && !(p.lines.skips_self && q == k)) {
        const int channel = p.map.first + k - (p.lines.skips_self && k > q);
        weight = data[channel * p.map.channel_stride + line * p.map.line_stride + q * p.map.position_stride];
      }
      line_map(local)[row * pitch() + column] = weight;
    }
  }

  // visit(first query, first key) for the pieces of the map tile, a tile by a tile
  template <class Visit>
  __device__ __forceinline__ void for_pieces(const Visit& visit) {
    for (int q = 0; q < p.map_rows; q += kTile) {
      for (int k = 0; k < p.map_columns; k += kTile) {
        visit(first_query + q, first_key + k);
      }
    }
  }

  // A warp's sums of 16 kRows channels; its owned positions are the 16-column tiles rank, rank + kWarps, ... of the
  // block's: [line][16 channels][8 positions][element].
  static constexpr int kOwnedTiles = kMaxOwned / kTile;
  template <int kRows, int kTiles>
  using Sums = Real[2][kRows][2 * kTiles][4];

  // sums += values * weights over the staged positions, up to `positions`, which the part has from `offset` on
  template <LineOwner kOwner, int kRows, int kTiles>
  __device__ __forceinline__ void add(Real (&sums)[2][kRows][2 * kTiles][4], int offset, int positions) {
    const auto values = block.tile(block.stage, 16 * kRows);
    const int owned = block.owned_end() - block.owned_begin;
    const int steps = min(round_up(positions, 16), kTile);
    for (int j = 0; j < steps; j += Arithmetic::kStep) {
      typename Arithmetic::A a[kRows][2];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        Arithmetic::load_a_channels(a[m], values, 16 * m, j);
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int column = 16 * (block.rank() + Shape::kWarps * i);
        if (column < owned) {
#pragma unroll
          for (int line = 0; line < 2; ++line) {
            typename Arithmetic::B b;
            const T* weights = line_map(2 * block.pair() + line);
            if constexpr (kOwner == LineOwner::kKeys) {
              Arithmetic::load_b_keys(b, weights, pitch(), offset + j, column, p.map_rows - 1);
            } else {
              Arithmetic::load_b_queries(b, weights, pitch(), offset + j, column, owned - 1);
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

  // output(:, owned) (+)= sums, times the factors for MergeScale::kFactors. By way of the staging memory, so that neighbouring
  // threads write neighbouring elements.
  template <MergeScale kScale, int kRows, int kTiles>
  __device__ __forceinline__ void write(
      const Real (&sums)[2][kRows][2 * kTiles][4], const LineFeatures& output, int channel, int channel_end,
      bool accumulate) {
    const int lane = opaque(lane_index()), g = lane / 4, t = lane % 4;
    const int owned = block.owned_end() - block.owned_begin;
    const int pitch = plane_words<Shape>(block.window.plane_bits, 16 * kRows);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int first = i * kTile;
      if (first >= owned) {
        break;
      }
      __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of a 16 x 16 tile: left and right columns
        const int column = 16 * block.rank() + 8 * half + 2 * t;
        Real scale[2][2] = {{1, 1}, {1, 1}};
        if constexpr (kScale == MergeScale::kFactors) {
          const Real* factor = factors(0) + 2 * block.pair() * p.map_rows;
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            scale[e / 2][e % 2] = factor[e / 2 * p.map_rows + min(first + column + e % 2, owned - 1)];
          }
        }
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
#pragma unroll
          for (int e = 0; e < 4; e += 2) {  // rows g and g + 8
            const Real(&low)[4] = sums[0][m][2 * i + half];
            const Real(&high)[4] = sums[1][m][2 * i + half];
            const Real values[2][2] = {
                {scale[0][0] * low[e], scale[0][1] * low[e + 1]}, {scale[1][0] * high[e], scale[1][1] * high[e + 1]}};
            store_results<T>(block.stage, block.plane(), pitch, (16 * m + g + e * 4) * Shape::kPitch + column, values);
          }
        }
      }
      __syncthreads();
      const LineMerge<T> merge{accumulate, kScale == MergeScale::kFactors ? factors(1) : nullptr, p.map_rows};
      store_line_tile<T, Shape, 16 * kRows>(
          block.stage, output, block.window, channel, channel_end, block.owned_begin + first, block.owned_end(), merge,
          first);
    }
  }

  // output(:, owned) (+)= values(:, contracted) * weights for the contracted positions from `first` to `end`, which the
  // map tile starts with; factors as in `write`
  template <LineOwner kOwner, MergeScale kScale = MergeScale::kNone>
  __device__ __forceinline__ void apply(
      const LineFeatures& values, const LineFeatures& output, int first, int end, bool accumulate) {
    for (int channel = group() * p.channels_per_group; channel < channel_end(values); channel += kLineChannels) {
      Sums<kLineChannels / 16, kOwnedTiles> sums = {};
      for (int j = first; j < end; j += kTile) {
        __syncthreads();
        load_line_tile<T, Shape, kLineChannels>(block.stage, values, block.window, channel, j, end);
        __syncthreads();
        add<kOwner, kLineChannels / 16, kOwnedTiles>(sums, j - first, end - j);
      }
      write<kScale, kLineChannels / 16, kOwnedTiles>(sums, output, channel, channel_end(values), accumulate);
    }
  }
};

}  // namespace segattn::cuda
