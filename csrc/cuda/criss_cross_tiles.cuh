// Feature tiles of several lines in shared memory, and the copies that fill and empty them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "criss_cross_arithmetic.cuh"
#include "criss_cross_params.cuh"

namespace segattn {

constexpr int kLineTile = 64;      // positions of a tile
constexpr int kLinePitch = 72;     // words of a tile's row: 8 (mod 16), see criss_cross_arithmetic.cuh
constexpr int kLineChannels = 32;  // channels of the tile that is summed over a line, and of its result
constexpr int kProductChannels = 16; // channels of the two tiles that are multiplied with each other
constexpr int kWarpsPerPair = 4;
// 16 bytes of a row in 16-bit types, whose weights would not fit shared memory for twice as many lines, 32 bytes in wider
// ones. Fewer for the arithmetics that need more than the 128 registers which 512 threads leave to each.
template <class Arithmetic>
constexpr int kMaxPairs = Arithmetic::kHungry ? 2 : 4;
template <class Arithmetic>
constexpr int kMaxLineThreads = 32 * kWarpsPerPair * kMaxPairs<Arithmetic>;
constexpr int kMaxOwned = 128;     // owned positions of a block

// Words by which a plane is longer than its rows, so that neighbouring lines of one position, which a warp stores
// together when lines are what is next to each other in memory, lie in different banks.
__host__ __device__ constexpr int plane_padding(int planes) { return planes >= 32 ? 1 : 32 / planes; }
__host__ __device__ constexpr int plane_words(int planes, int channels) {
  return channels * kLinePitch + plane_padding(planes);
}

// Where a block's lines and samples are.
struct LineWindow {
  int sample;
  int first_line; // even
  int line_end;   // of the sample
  int planes;     // of the block
};

template <class T>
__device__ __forceinline__ const T* line_data(const LineFeatures& f, const LineWindow& window, int channel) {
  return static_cast<const T*>(f.data) + window.sample * f.batch_stride + channel * f.channel_stride +
      window.first_line * f.line_stride;
}

// x, of which the compiler knows nothing: it would otherwise keep the addresses of every tile that a kernel copies, past
// the registers there are, where working them out again is cheap.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A thread's place in a tile: one plane and position, and every kLinesPerPlane-th channel. Blocks have 128 threads a pair
// of lines, so that (plane, position) fills them once (32 and 64 bits) or a half of them (16 bits). Neighbouring threads
// take what is next to each other in memory: positions of a row, lines otherwise.
template <class T>
struct TilePlace {
  int plane, position, line, channel;

  __device__ __forceinline__ TilePlace(const LineFeatures& f, const LineWindow& window) {
    const int thread = opaque(static_cast<int>(threadIdx.x)), places = window.planes * kLineTile;
    const int place = thread & (places - 1); // the number of planes is a power of two
    const bool lines_first = f.line_stride < f.position_stride;
    plane = lines_first ? place & (window.planes - 1) : place / kLineTile;
    position = lines_first ? place / window.planes : place % kLineTile;
    line = plane * kLinesPerPlane<T>;
    channel = kLinesPerPlane<T> == 1 ? 0 : thread / places;
  }
};

// The lines of a word: both of a plane's, or the plane's own; zero where there is none.
template <class T>
struct WordLoad {
  const T* data;
  int64_t step; // from one of the thread's channels to its next: offsets from the first would each take two registers
  int64_t line_stride;
  bool first, second; // which of the lines there are
  bool whole;         // both in one load

  __device__ __forceinline__ WordLoad(
      const LineFeatures& f, const LineWindow& window, const TilePlace<T>& place, int first_channel, int position,
      bool inside) {
    data = line_data<T>(f, window, first_channel + place.channel) + place.line * f.line_stride +
        position * f.position_stride;
    step = kLinesPerPlane<T> * f.channel_stride;
    line_stride = f.line_stride;
    first = inside && window.first_line + place.line < window.line_end;
    second = first && window.first_line + place.line + 1 < window.line_end;
    whole = f.paired && second;
  }

  // the word at the thread's next channel, zero unless `there_is_one`
  __device__ __forceinline__ LineWord<T> next(bool there_is_one) {
    const T* at = data;
    data += step;
    if (!there_is_one) {
      return LineWord<T>(0);
    }
    if constexpr (kLinesPerPlane<T> == 1) {
      return first ? *at : T(0);
    } else {
      const uint16_t* bits = reinterpret_cast<const uint16_t*>(at);
      if (whole) {
        return *reinterpret_cast<const uint32_t*>(bits);
      }
      const uint32_t even = first ? bits[0] : 0;
      const uint32_t odd = second ? bits[line_stride] : 0;
      return even | odd << 16;
    }
  }
};

// tile[plane][c][p] = f(first_channel + c, first_position + p) for c < kChannels, p < kLineTile, zeros beyond the edges.
template <class T, int kChannels>
__device__ __forceinline__ void load_line_tile(
    LineWord<T>* tile, const LineFeatures& f, const LineWindow& window, int first_channel, int first_position,
    int position_end) {
  constexpr int kStep = kLinesPerPlane<T>;
  constexpr int kBatch = 4; // loads under way at once
  static_assert(kChannels % (kStep * kBatch) == 0);
  const TilePlace<T> place(f, window);
  const int position = first_position + place.position;
  WordLoad<T> load(f, window, place, first_channel, position, position < position_end);
  LineWord<T>* target = tile + place.plane * plane_words(window.planes, kChannels) + place.channel * kLinePitch +
      place.position;
  const int channels = f.channels - first_channel - place.channel; // from the thread's first on
#pragma unroll
  for (int c = 0; c < kChannels; c += kStep * kBatch) {
    LineWord<T> words[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      words[i] = load.next(c + kStep * i < channels);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      target[(c + kStep * i) * kLinePitch] = words[i];
    }
  }
}

template <class T>
__device__ __forceinline__ void store_element(T* target, T value, bool accumulate) {
  *target = accumulate ? from_accumulator<T>(to_accumulator(*target) + to_accumulator(value)) : value;
}

// The reverse, of kLineChannels channels: f(first_channel + c, first_position + p) = tile[plane][c][p], or += where
// `accumulate`.
template <class T>
__device__ __forceinline__ void store_line_tile(
    const LineWord<T>* tile, const LineFeatures& f, const LineWindow& window, int first_channel, int channel_end,
    int first_position, int position_end, bool accumulate) {
  constexpr int kStep = kLinesPerPlane<T>;
  const TilePlace<T> place(f, window);
  const int line = window.first_line + place.line, position = first_position + place.position;
  if (position >= position_end || line >= window.line_end) {
    return;
  }
  const LineWord<T>* source = tile + place.plane * plane_words(window.planes, kLineChannels) + place.position;
  T* target = const_cast<T*>(line_data<T>(f, window, first_channel + place.channel)) + place.line * f.line_stride +
      position * f.position_stride;
  const int64_t step = kStep * f.channel_stride;
  const int channels = min(channel_end - first_channel, kLineChannels);
#pragma unroll 4
  for (int c = place.channel; c < channels; c += kStep) {
    const LineWord<T> word = source[c * kLinePitch];
    T elements[kLinesPerPlane<T>];
    *reinterpret_cast<LineWord<T>*>(elements) = word;
    store_element(target, elements[0], accumulate);
    if constexpr (kLinesPerPlane<T> == 2) {
      if (line + 1 < window.line_end) {
        store_element(target + f.line_stride, elements[1], accumulate);
      }
    }
    target += step;
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

} // namespace segattn
