// Feature tiles of several lines in shared memory, and the copies between them and global memory.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/criss_cross/line_mma.cuh"
#include "cuda/criss_cross/params.h"

namespace segattn::cuda {

// The warps that share a pair of lines. Each of them has 16 positions of a tile.
template <int kWarps_>
struct LineShape {
  static constexpr int kWarps = kWarps_;
  static constexpr int kTile = 16 * kWarps;  // positions of a tile
  static constexpr int kPitch = kTile + 8;   // words of a tile's row: 8 (mod 16), see line_mma.cuh
};
using StripShape = LineShape<4>;  // any number of pairs, tiles of 64 positions
using WideShape = LineShape<8>;   // one pair, lines of up to 128 positions in one tile

constexpr int kLineChannels = 32;     // channels of a tile of values, and of their weighted sum
constexpr int kProductChannels = 16;  // channels of the two tiles of a product of features
// Four pairs of columns are 16 consecutive bytes of a row in 16-bit types, where the weights of twice as many lines
// would not fit in shared memory, and 32 bytes in wider types. Register-bound policies have fewer pairs: they need
// more than the 128 registers per thread that blocks of 512 threads allow.
template <class Arithmetic, class Shape>
constexpr int kMaxPairs = Shape::kWarps == 8 ? 1
    : Arithmetic::kRegisterBound             ? 2
                                             : 4;
template <class Arithmetic, class Shape>
constexpr int kMaxLineThreads = 32 * Shape::kWarps * kMaxPairs<Arithmetic, Shape>;
constexpr int kMaxOwned = 128;  // positions owned by a block

// Padding words at the end of a plane. For columns a warp stores the neighbouring lines of one position together; the
// padding puts them in different banks.
__host__ __device__ constexpr int plane_padding(int plane_bits) {
  return 32 >> plane_bits;
}
// The length of a plane in a block of 2^plane_bits planes.
template <class Shape>
__host__ __device__ constexpr int plane_words(int plane_bits, int channels) {
  return channels * Shape::kPitch + plane_padding(plane_bits);
}

// The sample and the lines of a block.
struct LineWindow {
  int sample;
  int first_line;  // even
  int line_end;    // of the sample
  int plane_bits;  // the block has 2^plane_bits planes
};

// Returns x, with its value hidden from the optimizer. Otherwise the compiler keeps the addresses of all tiles that a
// kernel copies in registers and spills them, although recomputing them is cheap.
__device__ __forceinline__ int rematerialize(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class T>
__device__ __forceinline__ T* line_data(const LineFeatures& f, const LineWindow& window, int channel) {
  return static_cast<T*>(f.data) + rematerialize(window.sample) * f.batch_stride + channel * f.channel_stride +
      rematerialize(window.first_line) * f.line_stride;
}

// Whether neighbouring lines, not positions, are adjacent in memory: true for columns of a contiguous tensor.
template <class Strided>
__host__ __device__ __forceinline__ bool lines_innermost(const Strided& strided) {
  return strided.line_stride < strided.position_stride;
}

// The words of a tile that a thread copies: one plane and position, and every kLinesPerPlane-th channel. A block has
// one thread per line and position: one per plane and position in 32- and 64-bit types, two in 16-bit types.
// Neighbouring threads access neighbouring addresses in global memory.
template <class T, class Shape>
struct WordIndex {
  int plane, position, line, channel;

  __device__ __forceinline__ WordIndex(const LineFeatures& f, const LineWindow& window) {
    const int thread = rematerialize(static_cast<int>(threadIdx.x)), planes = 1 << window.plane_bits;
    const int word = thread & (planes * Shape::kTile - 1);
    plane = lines_innermost(f) ? word & (planes - 1) : word / Shape::kTile;
    position = lines_innermost(f) ? word >> window.plane_bits : word % Shape::kTile;
    line = plane * kLinesPerPlane<T>;
    channel = kLinesPerPlane<T> == 1 ? 0 : (thread >> window.plane_bits) / Shape::kTile;
  }
};

// The elements of a tile that a thread copies: one line and position, and every channel.
template <class T, class Shape>
struct ElementIndex {
  int line, position;

  __device__ __forceinline__ ElementIndex(const LineFeatures& f, const LineWindow& window) {
    const int thread = rematerialize(static_cast<int>(threadIdx.x));
    const int bits = window.plane_bits + (kLinesPerPlane<T> == 2);  // the block has 2^bits lines
    line = lines_innermost(f) ? thread & ((1 << bits) - 1) : thread / Shape::kTile;
    position = lines_innermost(f) ? thread >> bits : thread % Shape::kTile;
  }

  // The offset of the line's position 0 in the tile's first channel. The next channel is kElementPitch<T, Shape>
  // elements further.
  __device__ __forceinline__ int offset(int words_per_plane) const {
    return line / kLinesPerPlane<T> * words_per_plane * kLinesPerPlane<T> + line % kLinesPerPlane<T>;
  }
};
template <class T, class Shape>
constexpr int kElementPitch = Shape::kPitch * kLinesPerPlane<T>;

// Loads words of two 16-bit elements, one from each line of a plane; zero for lines and positions beyond the edges.
template <class T>
struct WordLoad {
  const uint16_t* data;
  int64_t step;  // between the thread's channels: an offset per channel would take two registers each
  int64_t line_stride;
  bool has_even, has_odd;  // which of the two lines exist
  bool paired;             // both exist or neither: one load

  template <class Shape>
  __device__ __forceinline__ WordLoad(
      const LineFeatures& f, const LineWindow& window, const WordIndex<T, Shape>& index, int first_channel,
      int position, bool inside) {
    data = line_data<uint16_t>(f, window, first_channel + index.channel) + index.line * f.line_stride +
        position * f.position_stride;
    step = kLinesPerPlane<T> * f.channel_stride;
    line_stride = f.line_stride;
    const int lines = window.line_end - rematerialize(window.first_line) - index.line;
    has_even = inside && lines > 0;
    has_odd = inside && lines > 1;
    paired = f.paired;
  }

  // target[i * pitch] = the words of the thread's next kCount channels, which exist, as do both lines or neither.
  template <int kCount>
  __device__ __forceinline__ void copy(uint32_t* target, int pitch) {
    constexpr int kBatch = 4;
    static_assert(kCount % kBatch == 0);
    if (!has_even) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        target[i * pitch] = 0;
      }
      return;
    }
    const uint16_t* odd_data = data + line_stride;
#pragma unroll
    for (int c = 0; c < kCount; c += kBatch) {
      uint32_t words[kBatch];
      if (paired) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i, data += step) {
          words[i] = *reinterpret_cast<const uint32_t*>(data);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kBatch; ++i, data += step, odd_data += step) {
          words[i] = *data | static_cast<uint32_t>(*odd_data) << 16;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        target[(c + i) * pitch] = words[i];
      }
    }
  }

  // The word of the thread's next channel; zero unless channel_exists.
  __device__ __forceinline__ uint32_t next(bool channel_exists) {
    const uint16_t* at = data;
    data += step;
    if (!channel_exists) {
      return 0;
    }
    if (paired) {
      return has_even ? *reinterpret_cast<const uint32_t*>(at) : 0;
    }
    const uint32_t even = has_even ? at[0] : 0;
    const uint32_t odd = has_odd ? at[line_stride] : 0;
    return even | odd << 16;
  }
};

// tile[plane][c][p] = f(first_channel + c, first_position + p) for c < kChannels, p < kTile; zeros beyond the edges.
// The loads of a warp are contiguous in global memory. A thread loads both lines of a word at once where they are
// paired, one after the other for rows, and single elements for columns that are not paired (odd width).
template <class T, class Shape, int kChannels>
__device__ __forceinline__ void load_line_tile(
    LineWord<T>* tile, const LineFeatures& f, const LineWindow& window, int first_channel, int first_position,
    int position_end) {
  constexpr int kBatch = 8;  // loads in flight
  first_channel = rematerialize(first_channel);
  first_position = rematerialize(first_position);
  const int words_per_plane = plane_words<Shape>(window.plane_bits, kChannels);
  if constexpr (kLinesPerPlane<T> == 2) {
    if (f.paired || !lines_innermost(f)) {
      constexpr int kWords = kBatch / 2;
      static_assert(kChannels % (2 * kWords) == 0);
      const WordIndex<T, Shape> index(f, window);
      const int position = first_position + index.position;
      WordLoad<T> load(f, window, index, first_channel, position, position < position_end);
      LineWord<T>* target = tile + index.plane * words_per_plane + index.channel * Shape::kPitch + index.position;
      const int channels = f.channels - first_channel - index.channel;  // from the thread's first channel on
      if (f.channels - first_channel >= kChannels && (load.has_odd || !load.has_even)) {
        load.template copy<kChannels / 2>(target, 2 * Shape::kPitch);
        return;
      }
#pragma unroll 1
      for (int c = 0; c < kChannels; c += 2 * kWords) {
        LineWord<T> words[kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          words[i] = load.next(c + 2 * i < channels);
        }
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          target[2 * i * Shape::kPitch] = words[i];
        }
        target += 2 * kWords * Shape::kPitch;
      }
      return;
    }
  }
  static_assert(kChannels % kBatch == 0);
  const ElementIndex<T, Shape> index(f, window);
  const int position = first_position + index.position;
  const T* source = line_data<T>(f, window, first_channel) + index.line * f.line_stride + position * f.position_stride;
  T* target = reinterpret_cast<T*>(tile) + index.offset(words_per_plane) + index.position * kLinesPerPlane<T>;
  const int64_t step = f.channel_stride;
  const bool inside = position < position_end && rematerialize(window.first_line) + index.line < window.line_end;
  const int channels = inside ? f.channels - first_channel : 0;
  if (channels >= kChannels) {
#pragma unroll
    for (int c = 0; c < kChannels; c += kBatch) {
      T elements[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i, source += step) {
        elements[i] = *source;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        target[(c + i) * kElementPitch<T, Shape>] = elements[i];
      }
    }
    return;
  }
#pragma unroll 1
  for (int c = 0; c < kChannels; c += kBatch) {
    T elements[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      elements[i] = c + i < channels ? *source : from_accumulator<T>(0);
      source += step;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      target[i * kElementPitch<T, Shape>] = elements[i];
    }
    target += kBatch * kElementPitch<T, Shape>;
  }
}

// How new results combine with the elements an output already holds: overwrite them, or add to them, scaled by a factor
// per line and position.
template <class T>
struct LineMerge {
  using Real = Accumulator<T>;
  bool accumulate;
  const Real* factors;  // [lines of the block][pitch]; null: 1
  int pitch;

  __device__ __forceinline__ Real factor(int line, int position) const {
    return factors == nullptr ? Real(1) : factors[line * pitch + position];
  }
  static __device__ __forceinline__ T merged(Real factor, T old, T value) {
    return from_accumulator<T>(factor * to_accumulator(old) + to_accumulator(value));
  }
};

// The inverse of load_line_tile: f(first_channel + c, first_position + p) = tile[plane][c][p] for c < kChannels, merged
// with the elements that f holds. first_position is position merge_position of `merge`.
template <class T, class Shape, int kChannels>
__device__ __forceinline__ void store_line_tile(
    const LineWord<T>* tile, const LineFeatures& f, const LineWindow& window, int first_channel, int channel_end,
    int first_position, int position_end, const LineMerge<T>& merge, int merge_position) {
  constexpr int kBatch = sizeof(T) == 4 ? 2 : 4;  // loads in flight; four spill registers with TF32 on sm_80
  first_position = rematerialize(first_position);
  const int words_per_plane = plane_words<Shape>(window.plane_bits, kChannels);
  const int channels = min(channel_end - first_channel, kChannels), positions = position_end - first_position;
  if constexpr (kLinesPerPlane<T> == 2) {
    if (f.paired) {
      const WordIndex<T, Shape> index(f, window);
      if (index.position >= positions || rematerialize(window.first_line) + index.line >= window.line_end) {
        return;
      }
      const LineWord<T>* source = tile + index.plane * words_per_plane + index.position;
      T* target = line_data<T>(f, window, first_channel + index.channel) + index.line +
          (first_position + index.position) * f.position_stride;
      const int64_t step = 2 * f.channel_stride;
      Accumulator<T> factors[2];
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        factors[line] = merge.accumulate ? merge.factor(index.line + line, merge_position + index.position) : 0;
      }
#pragma unroll 1
      for (int c = index.channel; c < channels; c += 2 * kBatch) {
        uint32_t old[kBatch] = {};
        if (merge.accumulate) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            if (c + 2 * i < channels) {
              old[i] = *reinterpret_cast<const uint32_t*>(target + i * step);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (c + 2 * i < channels) {
            uint32_t word = source[(c + 2 * i) * Shape::kPitch];
            if (merge.accumulate) {
              const T* before = reinterpret_cast<const T*>(&old[i]);
              T* now = reinterpret_cast<T*>(&word);
#pragma unroll
              for (int line = 0; line < 2; ++line) {
                now[line] = merge.merged(factors[line], before[line], now[line]);
              }
            }
            *reinterpret_cast<uint32_t*>(target + i * step) = word;
          }
        }
        target += kBatch * step;
      }
      return;
    }
  }
  const ElementIndex<T, Shape> index(f, window);
  const int end = rematerialize(window.first_line) + index.line < window.line_end ? positions : 0;
  const T* source = reinterpret_cast<const T*>(tile) + index.offset(words_per_plane);
  // the thread's own position of the next channel
  T* own = line_data<T>(f, window, first_channel) + index.line * f.line_stride +
      (first_position + index.position) * f.position_stride;
  if (f.position_stride != 1) {
    if (index.position >= end) {
      return;
    }
    source += index.position * kLinesPerPlane<T>;
    const Accumulator<T> factor = merge.accumulate ? merge.factor(index.line, merge_position + index.position) : 0;
#pragma unroll 1
    for (int c = 0; c < channels; c += kBatch) {
      T old[kBatch];
      T* at = own;
#pragma unroll
      for (int i = 0; i < kBatch; ++i, at += f.channel_stride) {
        if (merge.accumulate && c + i < channels) {
          old[i] = *at;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i, own += f.channel_stride) {
        if (c + i < channels) {
          const T value = source[i * kElementPitch<T, Shape>];
          *own = merge.accumulate ? merge.merged(factor, old[i], value) : value;
        }
      }
      source += kBatch * kElementPitch<T, Shape>;
    }
    return;
  }
  // A row can start anywhere in a sector, at a different offset in every channel. The threads rotate over the positions
  // so that each warp accesses whole sectors.
  constexpr unsigned kSector = 32 / static_cast<unsigned>(sizeof(T));
#pragma unroll 1
  for (int c = 0; c < channels; c += kBatch) {
    T old[kBatch];
    T* at[kBatch];
    int position[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const unsigned start = static_cast<unsigned>(reinterpret_cast<uintptr_t>(own) / sizeof(T)) - index.position;
      position[i] = static_cast<int>((index.position - (start & (kSector - 1))) & (Shape::kTile - 1));
      at[i] = own + (position[i] - index.position);
      own += f.channel_stride;
      if (c + i >= channels) {
        position[i] = end;
      }
      __syncwarp();  // lanes beyond the edges stay converged, so that the others' accesses remain one instruction
      if (merge.accumulate && position[i] < end) {
        old[i] = *at[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      __syncwarp();
      if (position[i] < end) {
        T value = source[i * kElementPitch<T, Shape> + position[i] * kLinesPerPlane<T>];
        if (merge.accumulate) {
          value = merge.merged(merge.factor(index.line, merge_position + position[i]), old[i], value);
        }
        *at[i] = value;
      }
    }
    source += kBatch * kElementPitch<T, Shape>;
  }
}

__device__ __forceinline__ void store_pair(double* pair, double low, double high) {
  *reinterpret_cast<double2*>(pair) = make_double2(low, high);
}

// Stores values[line][position] of two neighbouring positions of a pair of lines.
template <class T>
__device__ __forceinline__ void store_results(
    LineWord<T>* words, int plane, int pitch, int at, const Accumulator<T> (&values)[2][2]) {
  if constexpr (kLinesPerPlane<T> == 2) {
    uint2 pair;
    store_pair(reinterpret_cast<T*>(&pair.x), values[0][0], values[1][0]);
    store_pair(reinterpret_cast<T*>(&pair.y), values[0][1], values[1][1]);
    *reinterpret_cast<uint2*>(words + plane * pitch + at) = pair;
  } else {
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      store_pair(words + (plane + line) * pitch + at, values[line][0], values[line][1]);
    }
  }
}

}  // namespace segattn::cuda
