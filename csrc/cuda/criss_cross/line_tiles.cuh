// Feature tiles of several lines in shared memory, and the copies that fill and empty them.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/criss_cross/line_mma.cuh"
#include "cuda/criss_cross/params.h"

namespace segattn::cuda {

// How many warps share a pair of lines; each takes 16 of a tile's positions.
template <int kWarps_>
struct LineShape {
  static constexpr int kWarps = kWarps_;
  static constexpr int kTile = 16 * kWarps;  // positions of a tile
  static constexpr int kPitch = kTile + 8;   // words of a tile's row: 8 (mod 16), see line_mma.cuh
};
using StripShape = LineShape<4>;  // any number of pairs: strips of columns
using WideShape = LineShape<8>;   // one pair: rows of up to 128 positions, a single tile

constexpr int kLineChannels = 32;     // channels of the tile that is summed over a line, and of its result
constexpr int kProductChannels = 16;  // channels of the two tiles that are multiplied with each other
// 16 bytes of a row in 16-bit types, whose weights would not fit shared memory for twice as many lines, 32 bytes in wider
// ones. Fewer for the arithmetics that need more than the 128 registers which 512 threads leave to each.
template <class Arithmetic, class Shape>
constexpr int kMaxPairs = Shape::kWarps == 8 ? 1
    : Arithmetic::kRegisterBound             ? 2
                                             : 4;
template <class Arithmetic, class Shape>
constexpr int kMaxLineThreads = 32 * Shape::kWarps * kMaxPairs<Arithmetic, Shape>;
constexpr int kMaxOwned = 128;  // owned positions of a block

// Words by which a plane is longer than its rows, so that neighbouring lines of one position, which a warp stores
// together when lines are what is next to each other in memory, lie in different banks.
__host__ __device__ constexpr int plane_padding(int plane_bits) {
  return 32 >> plane_bits;
}
// for a block of 2^plane_bits planes
template <class Shape>
__host__ __device__ constexpr int plane_words(int plane_bits, int channels) {
  return channels * Shape::kPitch + plane_padding(plane_bits);
}

// Where a block's lines and samples are.
struct LineWindow {
  int sample;
  int first_line;  // even
  int line_end;    // of the sample
  int plane_bits;  // of the block: it has 2^plane_bits planes
};

// x, of which the compiler knows nothing: it would otherwise keep the addresses of every tile that a kernel copies, past
// the registers there are, where working them out again is cheap.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class T>
__device__ __forceinline__ T* line_data(const LineFeatures& f, const LineWindow& window, int channel) {
  return static_cast<T*>(f.data) + opaque(window.sample) * f.batch_stride + channel * f.channel_stride +
      opaque(window.first_line) * f.line_stride;
}

// Whether lines, not positions, are what is next to each other in memory: columns.
__device__ __forceinline__ bool lines_first(const LineFeatures& f) {
  return f.line_stride < f.position_stride;
}

// A thread's place in a tile of planes: one plane and position, and every kLinesPerPlane-th channel. Blocks have a thread
// for every line and position, so that (plane, position) fills them once (32 and 64 bits) or a half of them (16 bits).
// Neighbouring threads take what is next to each other in memory.
template <class T, class Shape>
struct WordIndex {
  int plane, position, line, channel;

  __device__ __forceinline__ WordIndex(const LineFeatures& f, const LineWindow& window) {
    const int thread = opaque(static_cast<int>(threadIdx.x)), planes = 1 << window.plane_bits;
    const int place = thread & (planes * Shape::kTile - 1);
    plane = lines_first(f) ? place & (planes - 1) : place / Shape::kTile;
    position = lines_first(f) ? place >> window.plane_bits : place % Shape::kTile;
    line = plane * kLinesPerPlane<T>;
    channel = kLinesPerPlane<T> == 1 ? 0 : (thread >> window.plane_bits) / Shape::kTile;
  }
};

// A thread's place in a tile of elements: one line and position, and every channel.
template <class T, class Shape>
struct ElementIndex {
  int line, position;

  __device__ __forceinline__ ElementIndex(const LineFeatures& f, const LineWindow& window) {
    const int thread = opaque(static_cast<int>(threadIdx.x));
    const int bits = window.plane_bits + (kLinesPerPlane<T> == 2);  // of the block's number of lines
    line = lines_first(f) ? thread & ((1 << bits) - 1) : thread / Shape::kTile;
    position = lines_first(f) ? thread >> bits : thread % Shape::kTile;
  }

  // Of the line's position 0 and the tile's first channel; elements of a position's next channel are
  // kElementPitch<T, Shape> further on.
  __device__ __forceinline__ int offset(int words_per_plane) const {
    return line / kLinesPerPlane<T> * words_per_plane * kLinesPerPlane<T> + line % kLinesPerPlane<T>;
  }
};
template <class T, class Shape>
constexpr int kElementPitch = Shape::kPitch * kLinesPerPlane<T>;

// The two lines of a 16-bit word; zero where there is none.
template <class T>
struct WordLoad {
  const uint16_t* data;
  int64_t step;  // from one of the thread's channels to its next: offsets from the first would each take two registers
  int64_t line_stride;
  bool first, second;  // which of the lines there are
  bool whole;          // both or none, in one load

  template <class Shape>
  __device__ __forceinline__ WordLoad(
      const LineFeatures& f, const LineWindow& window, const WordIndex<T, Shape>& place, int first_channel,
      int position, bool inside) {
    data = line_data<uint16_t>(f, window, first_channel + place.channel) + place.line * f.line_stride +
        position * f.position_stride;
    step = kLinesPerPlane<T> * f.channel_stride;
    line_stride = f.line_stride;
    const int lines = window.line_end - opaque(window.first_line) - place.line;
    first = inside && lines > 0;
    second = inside && lines > 1;
    whole = f.paired;
  }

  // the word at the thread's next channel, zero unless `there_is_one`
  __device__ __forceinline__ uint32_t next(bool there_is_one) {
    const uint16_t* at = data;
    data += step;
    if (!there_is_one) {
      return 0;
    }
    if (whole) {
      return first ? *reinterpret_cast<const uint32_t*>(at) : 0;
    }
    const uint32_t even = first ? at[0] : 0;
    const uint32_t odd = second ? at[line_stride] : 0;
    return even | odd << 16;
  }
};

// tile[plane][c][p] = f(first_channel + c, first_position + p) for c < kChannels, p < kTile, zeros beyond the edges.
// A warp's load covers whole runs of what is next to each other in memory: two lines a thread where a word holds
// neighbours, two loads of a row's positions each otherwise, and an element a thread where neighbouring lines are in no
// common word (columns of odd width).
template <class T, class Shape, int kChannels>
__device__ __forceinline__ void load_line_tile(
    LineWord<T>* tile, const LineFeatures& f, const LineWindow& window, int first_channel, int first_position,
    int position_end) {
  constexpr int kBatch = 8;  // loads under way at once
  first_channel = opaque(first_channel);
  first_position = opaque(first_position);
  const int words_per_plane = plane_words<Shape>(window.plane_bits, kChannels);
  if constexpr (kLinesPerPlane<T> == 2) {
    if (f.paired || !lines_first(f)) {
      constexpr int kWords = kBatch / 2;
      static_assert(kChannels % (2 * kWords) == 0);
      const WordIndex<T, Shape> place(f, window);
      const int position = first_position + place.position;
      WordLoad<T> load(f, window, place, first_channel, position, position < position_end);
      LineWord<T>* target = tile + place.plane * words_per_plane + place.channel * Shape::kPitch + place.position;
      const int channels = f.channels - first_channel - place.channel;  // from the thread's first on
#pragma unroll
      for (int c = 0; c < kChannels; c += 2 * kWords) {
        LineWord<T> words[kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          words[i] = load.next(c + 2 * i < channels);
        }
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          target[(c + 2 * i) * Shape::kPitch] = words[i];
        }
      }
      return;
    }
  }
  static_assert(kChannels % kBatch == 0);
  const ElementIndex<T, Shape> place(f, window);
  const int position = first_position + place.position;
  const T* source = line_data<T>(f, window, first_channel) + place.line * f.line_stride + position * f.position_stride;
  T* target = reinterpret_cast<T*>(tile) + place.offset(words_per_plane) + place.position * kLinesPerPlane<T>;
  const int64_t step = f.channel_stride;
  const bool inside = position < position_end && opaque(window.first_line) + place.line < window.line_end;
  const int channels = inside ? f.channels - first_channel : 0;
#pragma unroll
  for (int c = 0; c < kChannels; c += kBatch) {
    T elements[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      elements[i] = c + i < channels ? *source : from_accumulator<T>(0);
      source += step;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      target[(c + i) * kElementPitch<T, Shape>] = elements[i];
    }
  }
}

// What becomes of the elements that an output holds already: they are lost, or weighted and added to.
template <class T>
struct LineMerge {
  using Real = Accumulator<T>;
  bool accumulate;
  const Real* weights;  // [lines of the block][pitch]; null: 1
  int pitch;

  __device__ __forceinline__ T operator()(T old, T value, int line, int position) const {
    const Real weight = weights == nullptr ? Real(1) : weights[line * pitch + position];
    return from_accumulator<T>(weight * to_accumulator(old) + to_accumulator(value));
  }
};

// The reverse of load_line_tile, of kChannels channels: f(first_channel + c, first_position + p) = tile[plane][c][p],
// merged with what is there. Positions of `merge` count from merge_position on.
template <class T, class Shape, int kChannels>
__device__ __forceinline__ void store_line_tile(
    const LineWord<T>* tile, const LineFeatures& f, const LineWindow& window, int first_channel, int channel_end,
    int first_position, int position_end, const LineMerge<T>& merge, int merge_position) {
  constexpr int kBatch = 4;  // loads under way at once
  first_position = opaque(first_position);
  const int words_per_plane = plane_words<Shape>(window.plane_bits, kChannels);
  const int channels = min(channel_end - first_channel, kChannels), positions = position_end - first_position;
  if constexpr (kLinesPerPlane<T> == 2) {
    if (f.paired) {
      const WordIndex<T, Shape> place(f, window);
      if (place.position >= positions || opaque(window.first_line) + place.line >= window.line_end) {
        return;
      }
      const LineWord<T>* source = tile + place.plane * words_per_plane + place.position;
      T* target = line_data<T>(f, window, first_channel + place.channel) + place.line +
          (first_position + place.position) * f.position_stride;
      const int64_t step = 2 * f.channel_stride;
#pragma unroll 1
      for (int c = place.channel; c < channels; c += 2 * kBatch) {
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
                now[line] = merge(before[line], now[line], place.line + line, merge_position + place.position);
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
  const ElementIndex<T, Shape> place(f, window);
  const int end = opaque(window.first_line) + place.line < window.line_end ? positions : 0;
  const T* source = reinterpret_cast<const T*>(tile) + place.offset(words_per_plane);
  T* target = line_data<T>(f, window, first_channel) + place.line * f.line_stride + first_position * f.position_stride;
  // Positions in a row start in the middle of a sector, at another place in every channel: the threads turn so that
  // each warp's elements are whole sectors.
  constexpr int kSector = 32 / static_cast<int>(sizeof(T));
  const bool turns = f.position_stride == 1;
#pragma unroll 1
  for (int c = 0; c < channels; c += kBatch) {
    T old[kBatch];
    int position[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const T* channel = target + i * f.channel_stride;
      const int turn = turns ? static_cast<int>(reinterpret_cast<uintptr_t>(channel) / sizeof(T)) & (kSector - 1) : 0;
      position[i] = (place.position - turn) & (Shape::kTile - 1);
      if (c + i >= channels) {
        position[i] = end;
      }
      __syncwarp();  // lanes beyond the edges keep step, so that the others' accesses stay one
      if (merge.accumulate && position[i] < end) {
        old[i] = channel[position[i] * f.position_stride];
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      __syncwarp();
      if (position[i] < end) {
        T value = source[(c + i) * kElementPitch<T, Shape> + position[i] * kLinesPerPlane<T>];
        if (merge.accumulate) {
          value = merge(old[i], value, place.line, merge_position + position[i]);
        }
        target[i * f.channel_stride + position[i] * f.position_stride] = value;
      }
    }
    target += kBatch * f.channel_stride;
  }
}

__device__ __forceinline__ void store_pair(double* pair, double low, double high) {
  *reinterpret_cast<double2*>(pair) = make_double2(low, high);
}

// The words of neighbouring positions p, p + 1 of a pair of lines: values[line][position].
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
