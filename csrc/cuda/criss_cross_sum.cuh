// The kernels behind every sum over a line: aggregation, criss-cross attention's output and all gradients.
#pragma once

#include "criss_cross.cuh"

namespace segattn {

// A block's weights in shared memory, and sums of values by them.
template <class Arithmetic>
struct LineWeights {
  using T = typename Arithmetic::Element;
  using Word = LineWord<T>;
  using Real = typename Arithmetic::Real;
  static constexpr int kBlocks = kLineTile / 8;

  const LineSumParams& p;
  LineBlock<Arithmetic> block;
  int first_query, first_key; // of the map

  static __host__ __device__ constexpr int map_pitch(int columns) { return columns + 8; }
  static __host__ __device__ constexpr size_t stage_bytes(int planes) {
    return sizeof(Word) * planes * (plane_words(planes, kLineChannels) + plane_padding(planes));
  }
  static constexpr size_t shared_bytes(int pairs, int queries, int keys) {
    return stage_bytes(pairs * 2 / kLinesPerPlane<T>) +
        sizeof(T) * 2 * pairs * queries * map_pitch(round_up_16(keys));
  }

  __device__ __forceinline__ LineWeights(const LineSumParams& params, Word* shared, int channel_groups)
      : p(params), block(p.lines, shared, channel_groups) {
    first_query = first_key = 0;
  }

  __device__ __forceinline__ int pitch() const { return map_pitch(p.map_columns); }
  // [p.map_rows queries][pitch() keys], behind the staging memory, which is a multiple of 16 bytes for any number of planes
  __device__ __forceinline__ T* line_map(int line) const {
    unsigned char* maps = reinterpret_cast<unsigned char*>(block.stage) + stage_bytes(block.window.planes);
    return reinterpret_cast<T*>(maps) + line * p.map_rows * pitch();
  }

  // The map tile's element of the warp's pair at queries q, keys k and k + 1; nothing outside the tile.
  __device__ __forceinline__ T* map_element(int line, int q, int k) const {
    const int row = q - first_query, column = k - first_key;
    return row < p.map_rows && column < p.map_columns ? line_map(2 * block.pair() + line) + row * pitch() + column
                                                      : nullptr;
  }

  __device__ __forceinline__ void make_softmax(int query0, int key0) {
    Real d[2][kBlocks][4];
    block.multiply_features(d, p.query, p.key, query0, key0);
    const int lane = opaque(lane_index()), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = query0 + 16 * block.quarter() + g + 8 * half;
        const bool inside = q < p.lines.length && block.first_line() + line < block.window.line_end;
        const Real lse = inside ? *block.scalar(p.logsumexp, line, q) : Real(0);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          const int k = key0 + 8 * j + 2 * t;
          if (T* element = map_element(line, q, k)) {
            Real weights[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              weights[e] = block.sees(line, q, k + e)
                  ? line_exp(d[line][j][2 * half + e] * static_cast<Real>(p.scale) - lse)
                  : Real(0);
            }
            store_pair(element, weights[0], weights[1]);
          }
        }
      }
    }
  }

  // The weights are in the map tile, put there by this thread; the gradient of the energy takes their place.
  __device__ __forceinline__ void make_gradient(int query0, int key0) {
    Real d[2][kBlocks][4];
    block.multiply_features(d, p.grad_output, p.value, query0, key0);
    const int lane = opaque(lane_index()), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = query0 + 16 * block.quarter() + g + 8 * half;
        const bool inside = q < p.lines.length && block.first_line() + line < block.window.line_end;
        const Real delta = inside ? *block.scalar(p.delta, line, q) : Real(0);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          const int k = key0 + 8 * j + 2 * t;
          if (T* element = map_element(line, q, k)) {
            Real gradients[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              // the product beyond the edges is 0, delta may not be: the weight is 0 there
              gradients[e] = static_cast<Real>(p.scale) * to_accumulator(element[e]) *
                  (d[line][j][2 * half + e] - delta);
            }
            store_pair(element, gradients[0], gradients[1]);
          }
        }
      }
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
      if (q < p.lines.length && k < p.lines.length && line < block.window.line_end &&
          !(p.lines.skips_self && q == k)) {
        const int channel = p.map.first + k - (p.lines.skips_self && k > q);
        weight = data[channel * p.map.channel_stride + line * p.map.line_stride + q * p.map.position_stride];
      }
      line_map(local)[row * pitch() + column] = weight;
    }
  }

  // visit(first query, first key) for the 64 x 64 pieces of the map tile
  template <class Visit>
  __device__ __forceinline__ void for_pieces(const Visit& visit) {
    for (int q = 0; q < p.map_rows; q += kLineTile) {
      for (int k = 0; k < p.map_columns; k += kLineTile) {
        visit(first_query + q, first_key + k);
      }
    }
  }

  // The warp's owned positions are the 16-column tiles quarter and quarter + 4 of the block's.
  static constexpr int kOwnedTiles = kMaxOwned / (16 * kWarpsPerPair);
  static constexpr int kRows = kLineChannels / 16;
  using Sums = Real[2][kRows][2 * kOwnedTiles][4];

  // sums += values * weights over the staged positions, up to `positions`, which the part has from `offset` on
  template <bool kOwnsKeys>
  __device__ __forceinline__ void add(Sums& sums, int offset, int positions) {
    const auto values = block.tile(block.stage, kLineChannels);
    const int owned = block.owned_end() - block.owned_begin;
    const int steps = min(round_up_16(positions), kLineTile);
    for (int j = 0; j < steps; j += Arithmetic::kStep) {
      typename Arithmetic::A a[kRows][2];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        Arithmetic::load_a_channels(a[m], values, 16 * m, j);
      }
#pragma unroll
      for (int i = 0; i < kOwnedTiles; ++i) {
        const int column = 16 * (block.quarter() + kWarpsPerPair * i);
        if (column < owned) {
#pragma unroll
          for (int line = 0; line < 2; ++line) {
            typename Arithmetic::B b;
            const T* weights = line_map(2 * block.pair() + line);
            if constexpr (kOwnsKeys) {
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

  // By way of the staging memory, so that neighbouring threads write neighbouring elements.
  __device__ __forceinline__ void write(
      const Sums& sums, const LineFeatures& output, int channel, int channel_end, bool accumulate) {
    const int lane = opaque(lane_index()), g = lane / 4, t = lane % 4;
    const int owned = block.owned_end() - block.owned_begin, pitch = plane_words(block.window.planes, kLineChannels);
#pragma unroll
    for (int i = 0; i < kOwnedTiles; ++i) {
      const int first = i * 16 * kWarpsPerPair;
      if (first >= owned) {
        break;
      }
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int part = 0; part < 4; ++part) { // of a 16 x 16 tile: rows g and g + 8, left and right columns
          const int half = part / 2, e = part % 2 * 2;
          const Real values[2][2] = {
              {sums[0][m][2 * i + half][e], sums[0][m][2 * i + half][e + 1]},
              {sums[1][m][2 * i + half][e], sums[1][m][2 * i + half][e + 1]}};
          const int at = (16 * m + g + e * 4) * kLinePitch + 16 * block.quarter() + 8 * half + 2 * t;
          store_results<T>(block.stage, block.plane(), pitch, at, values);
        }
      }
      __syncthreads();
      store_line_tile<T>(
          block.stage, output, block.window, channel, channel_end, block.owned_begin + first, block.owned_end(),
          accumulate);
    }
  }

  // output(:, owned) (+)= values(:, contracted) * weights for the contracted positions from `first` to `end`, which the
  // map tile starts with
  template <bool kOwnsKeys>
  __device__ __forceinline__ void apply(
      const LineFeatures& values, const LineFeatures& output, int channel_begin, int channel_end, int first, int end,
      bool accumulate) {
    for (int channel = channel_begin; channel < channel_end; channel += kLineChannels) {
      Sums sums = {};
      for (int j = first; j < end; j += kLineTile) {
        __syncthreads();
        load_line_tile<T, kLineChannels>(block.stage, values, block.window, channel, j, end);
        __syncthreads();
        add<kOwnsKeys>(sums, j - first, end - j);
      }
      write(sums, output, channel, channel_end, accumulate);
    }
  }
};

template <class Arithmetic, LineWeight kWeight, bool kOwnsKeys>
__device__ __forceinline__ void line_sum(const LineSumParams& p, LineWord<typename Arithmetic::Element>* shared) {
  LineWeights<Arithmetic> weights(p, shared, p.channel_groups);
  const LineBlock<Arithmetic>& block = weights.block;
  for (int first = 0; first < p.lines.length; first += p.part) {
    weights.first_query = kOwnsKeys ? first : block.owned_begin;
    weights.first_key = kOwnsKeys ? block.owned_begin : first;
    if constexpr (kWeight == LineWeight::kGiven) {
      weights.copy_given();
    } else {
      weights.for_pieces([&](int query, int key) {
        weights.make_softmax(query, key);
        if constexpr (kWeight == LineWeight::kGradient) {
          weights.make_gradient(query, key);
        }
      });
    }
    const int channel_begin = static_cast<int>(blockIdx.x) % p.channel_groups * p.channels_per_group;
    weights.template apply<kOwnsKeys>(
        p.values, p.output, channel_begin, min(channel_begin + p.channels_per_group, p.values.channels), first,
        min(first + p.part, p.lines.length), p.accumulate || first > 0);
    __syncthreads(); // the next part's weights take the place of these
  }
}

// The block owns whole lines: weights are made once, serve the value gradient, and turn into the energies' gradient.
template <class Arithmetic>
__device__ __forceinline__ void line_backward(
    const LineBackwardParams& p, LineWord<typename Arithmetic::Element>* shared) {
  const int length = p.lines.length;
  LineWeights<Arithmetic> weights(p, shared, 1);
    weights.for_pieces([&](int query, int key) { weights.make_softmax(query, key); });
  weights.template apply<true>(p.grad_output, p.grad_value, 0, p.value.channels, 0, length, p.accumulate);
  weights.for_pieces([&](int query, int key) { weights.make_gradient(query, key); });
  weights.template apply<false>(p.key, p.grad_query, 0, p.key.channels, 0, length, p.accumulate);
  weights.template apply<true>(p.query, p.grad_key, 0, p.query.channels, 0, length, p.accumulate);
}

template <class Arithmetic, LineWeight kWeight, bool kOwnsKeys>
__global__ void __launch_bounds__(kMaxLineThreads<Arithmetic>) line_sum_kernel(
    const LineSumParams p) {
  if constexpr (kLineCompiled<Arithmetic>) {
    SEGATTN_DYNAMIC_SHARED(LineWord<typename Arithmetic::Element>, shared);
    line_sum<Arithmetic, kWeight, kOwnsKeys>(p, shared);
  }
}

template <class Arithmetic>
__global__ void __launch_bounds__(kMaxLineThreads<Arithmetic>) line_backward_kernel(
    const LineBackwardParams p) {
  if constexpr (kLineCompiled<Arithmetic>) {
    SEGATTN_DYNAMIC_SHARED(LineWord<typename Arithmetic::Element>, shared);
    line_backward<Arithmetic>(p, shared);
  }
}

} // namespace segattn
