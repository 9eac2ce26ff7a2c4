// The kernel behind every sum over a line: aggregation, criss-cross attention's output and all gradients.
#pragma once

#include "criss_cross.cuh"

namespace segattn {

template <class Arithmetic, LineWeight kWeight, bool kOwnsKeys>
struct LineSum {
  using T = typename Arithmetic::Element;
  using Word = LineWord<T>;
  using Real = typename Arithmetic::Real;
  static constexpr int kBlocks = kLineTile / 8;

  const LineSumParams& p;
  LineBlock<Arithmetic> block;
  MapTile<T> map;

  // What of the shared memory the weights need: rows and columns of a line's map tile.
  static __host__ __device__ constexpr int map_rows(int owned, int part) {
    return kOwnsKeys ? round_up_16(part) : owned;
  }
  static __host__ __device__ constexpr int map_columns(int owned, int part) {
    return round_up_16(kOwnsKeys ? owned : part);
  }
  static constexpr size_t stage_bytes(int planes) {
    return sizeof(Word) * planes * (plane_words(planes, kLineChannels) + plane_padding(planes));
  }
  static constexpr size_t shared_bytes(int pairs, int owned, int part) {
    return stage_bytes(pairs * 2 / kLinesPerPlane<T>) +
        sizeof(T) * 2 * pairs * map_rows(owned, part) * MapTile<T>::pitch_of(map_columns(owned, part));
  }

  __device__ __forceinline__ LineSum(const LineSumParams& params, Word* shared) : p(params), block(p.lines, shared) {
    const int planes = block.window.planes;
    // 16-byte aligned: a plane pair of words and padding is a multiple of 16 bytes for every number of planes
    map.data = reinterpret_cast<T*>(shared + planes * (plane_words(planes, kLineChannels) + plane_padding(planes)));
    map.rows = map_rows(p.lines.owned, p.part);
    map.columns = map_columns(p.lines.owned, p.part);
  }

  // The map tile's element of the warp's pair at queries q, keys k and k + 1; nothing outside the tile.
  __device__ __forceinline__ T* map_element(int line, int q, int k) const {
    const int row = q - map.first_query, column = k - map.first_key;
    return row < map.rows && column < map.columns ? map.line(2 * block.pair + line) + row * map.pitch() + column
                                                  : nullptr;
  }

  __device__ __forceinline__ void weights_of(Real (&d)[2][kBlocks][4], int first_query, int first_key) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    block.multiply_features(d, p.query, p.key, first_query, first_key);
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = first_query + 16 * block.quarter + g + 8 * half;
        const bool inside = q < p.lines.length && block.first_line() + line < block.window.line_end;
        const Real lse = inside ? *block.scalar(p.logsumexp, line, q) : Real(0);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          const int k = first_key + 8 * j + 2 * t;
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
  __device__ __forceinline__ void gradients_of(Real (&d)[2][kBlocks][4], int first_query, int first_key) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    block.multiply_features(d, p.grad_output, p.value, first_query, first_key);
#pragma unroll
    for (int line = 0; line < 2; ++line) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = first_query + 16 * block.quarter + g + 8 * half;
        const bool inside = q < p.lines.length && block.first_line() + line < block.window.line_end;
        const Real delta = inside ? *block.scalar(p.delta, line, q) : Real(0);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          const int k = first_key + 8 * j + 2 * t;
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
    const int lines = 2 * p.lines.pairs, per_key = lines * map.rows, total = map.columns * per_key;
    const T* data = static_cast<const T*>(p.map.data) + block.window.sample * p.map.batch_stride;
    for (int item = static_cast<int>(threadIdx.x); item < total; item += static_cast<int>(blockDim.x)) {
      const int column = item / per_key, rest = item - column * per_key;
      const int local = lines_first ? rest % lines : rest / map.rows;
      const int row = lines_first ? rest / lines : rest - local * map.rows;
      const int line = block.window.first_line + local, q = map.first_query + row, k = map.first_key + column;
      T weight = from_accumulator<T>(0);
      if (q < p.lines.length && k < p.lines.length && line < block.window.line_end &&
          !(p.lines.skips_self && q == k)) {
        const int channel = p.map.first + k - (p.lines.skips_self && k > q);
        weight = data[channel * p.map.channel_stride + line * p.map.line_stride + q * p.map.position_stride];
      }
      map.line(local)[row * map.pitch() + column] = weight;
    }
  }

  // Fills the map tile, whose first query and key are set.
  __device__ __forceinline__ void fill() {
    if constexpr (kWeight == LineWeight::kGiven) {
      copy_given();
    } else {
      for (int q = 0; q < map.rows; q += kLineTile) {
        for (int k = 0; k < map.columns; k += kLineTile) {
          Real d[2][kBlocks][4];
          weights_of(d, map.first_query + q, map.first_key + k);
          if constexpr (kWeight == LineWeight::kGradient) {
            gradients_of(d, map.first_query + q, map.first_key + k);
          }
        }
      }
    }
  }

  // The warp's owned positions are the 16-column tiles quarter and quarter + 4 of the block's.
  static constexpr int kOwnedTiles = kMaxOwned / (16 * kWarpsPerPair);
  static constexpr int kRows = kLineChannels / 16;
  using Sums = Real[2][kRows][2 * kOwnedTiles][4];

  // sums += values * weights over the staged positions, up to `positions`, which the part has from `offset` on
  __device__ __forceinline__ void add(Sums& sums, int offset, int positions) {
    const auto values = block.tile(block.stage, kLineChannels);
    const int owned = block.owned_end - block.owned_begin;
    const int steps = min(round_up_16(positions), kLineTile);
    for (int j = 0; j < steps; j += Arithmetic::kStep) {
      typename Arithmetic::A a[kRows][2];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        Arithmetic::load_a_channels(a[m], values, 16 * m, j);
      }
#pragma unroll
      for (int i = 0; i < kOwnedTiles; ++i) {
        const int column = 16 * (block.quarter + kWarpsPerPair * i);
        if (column < owned) {
#pragma unroll
          for (int line = 0; line < 2; ++line) {
            typename Arithmetic::B b;
            const T* weights = map.line(2 * block.pair + line);
            if constexpr (kOwnsKeys) {
              Arithmetic::load_b_keys(b, weights, map.pitch(), offset + j, column);
            } else {
              Arithmetic::load_b_queries(b, weights, map.pitch(), offset + j, column, owned - 1);
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
  __device__ __forceinline__ void write(const Sums& sums, int channel, int channel_end, bool accumulate) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const int owned = block.owned_end - block.owned_begin, pitch = plane_words(block.window.planes, kLineChannels);
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
          const int at = (16 * m + g + e * 4) * kLinePitch + 16 * block.quarter + 8 * half + 2 * t;
          store_results<T>(block.stage, block.plane(), pitch, at, values);
        }
      }
      __syncthreads();
      store_line_tile<T>(
          block.stage, p.output, block.window, channel, channel_end, block.owned_begin + first, block.owned_end,
          accumulate);
    }
  }

  // Adds up one part of the contracted positions, for all channels of the block's group.
  __device__ __forceinline__ void add_part(int first, int end) {
    map.first_query = kOwnsKeys ? first : block.owned_begin;
    map.first_key = kOwnsKeys ? block.owned_begin : first;
    fill();
    const int channel_begin = block.channel_group * p.channels_per_group;
    const int channel_end = min(channel_begin + p.channels_per_group, p.values.channels);
    for (int channel = channel_begin; channel < channel_end; channel += kLineChannels) {
      Sums sums = {};
      for (int j = first; j < end; j += kLineTile) {
        __syncthreads();
        load_line_tile<T, kLineChannels>(block.stage, p.values, block.window, channel, j, end);
        __syncthreads();
        add(sums, j - first, end - j);
      }
      write(sums, channel, channel_end, p.accumulate || first > 0);
    }
    __syncthreads(); // the next weights take the place of these
  }

  __device__ __forceinline__ void run() {
    for (int64_t index = blockIdx.x; block.start(index, p.channel_groups); index += gridDim.x) {
      for (int first = 0; first < p.lines.length; first += p.part) {
        add_part(first, min(first + p.part, p.lines.length));
      }
    }
  }
};

template <class Arithmetic, LineWeight kWeight, bool kOwnsKeys>
__global__ void __launch_bounds__(kMaxLineThreads<typename Arithmetic::Element>) line_sum_kernel(const LineSumParams p) {
  if constexpr (kLineCompiled<Arithmetic>) {
    SEGATTN_DYNAMIC_SHARED(LineWord<typename Arithmetic::Element>, shared);
    LineSum<Arithmetic, kWeight, kOwnsKeys> sum(p, shared);
    sum.run();
  }
}

} // namespace segattn
