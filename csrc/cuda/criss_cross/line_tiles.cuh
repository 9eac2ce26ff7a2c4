// Feature tiles of several lines in shared memory, and the copies between them and global memory.
#pragma once

#include <cstdint>
#include <type_traits>

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

// The element of a channel, a line of the block and a position. Products of 32-bit numbers take one instruction.
template <class T>
__device__ __forceinline__ T* element_at(
    const LineFeatures& f, const LineWindow& window, int channel, int line, int position) {
  return static_cast<T*>(f.data) + window.sample * f.batch_stride + static_cast<int64_t>(channel) * f.channel_stride +
      static_cast<int64_t>(rematerialize(window.first_line) + line) * f.line_stride +
      static_cast<int64_t>(position) * f.position_stride;
}

// Whether neighbouring lines, not positions, are adjacent in memory: true for columns of a contiguous tensor.
template <class Strided>
__host__ __device__ __forceinline__ bool lines_innermost(const Strided& strided) {
  return strided.line_stride < strided.position_stride;
}

// What a thread copies of a tile: items of kLines lines and kPositions positions, and every kChannelStep-th channel.
// A block has one thread per line and position. Neighbouring threads access neighbouring addresses in global memory.
template <class Shape, int kLines, int kPositions>
struct TileItem {
  static constexpr int kChannelStep = kLines * kPositions;
  int line, position, channel;

  // bits: the block has 2^bits lines. Unsigned, because divisions are then shifts.
  __device__ __forceinline__ TileItem(const LineFeatures& f, unsigned bits) {
    constexpr unsigned kPerLine = Shape::kTile / kPositions;
    const unsigned thread = rematerialize(static_cast<int>(threadIdx.x));
    const unsigned group_bits = bits - (kLines == 2), item = thread & ((kPerLine << group_bits) - 1);
    const bool by_line = kPositions == 1 && lines_innermost(f);
    line = kLines * (by_line ? item & ((1u << group_bits) - 1) : item / kPerLine);
    position = kPositions * (by_line ? item >> group_bits : item % kPerLine);
    channel = kChannelStep == 1 ? 0 : (thread >> group_bits) / kPerLine;
  }
};

// The distance of two channels of a tile in elements of type T.
template <class T, class Shape>
constexpr int kElementPitch = Shape::kPitch * kLinesPerPlane<T>;

// The element of a tile for a line and position, in the tile's first channel.
template <class T>
__host__ __device__ __forceinline__ int tile_offset(int line, int position, int words_per_plane) {
  constexpr int kLines = kLinesPerPlane<T>;
  return ((line >> (kLines - 1)) * words_per_plane + position) * kLines + (line & (kLines - 1));
}

// target[i * kPitch] = source[i * step] as words of type Word, for i < kCount; zero from `existing` on.
template <class Word, int kCount, int kPitch, class T>
__device__ __forceinline__ void copy_channels(Word* target, const T* source, int step, int existing) {
  constexpr int kBatch = kCount < 8 ? kCount : 8;  // loads in flight
  static_assert(kCount % kBatch == 0);
  step = rematerialize(step);
  if (existing >= kCount) {
#pragma unroll
    for (int c = 0; c < kCount; c += kBatch) {
      Word words[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i, source += step) {
        words[i] = *reinterpret_cast<const Word*>(source);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        target[(c + i) * kPitch] = words[i];
      }
    }
  } else if (existing <= 0) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      target[c * kPitch] = Word{};
    }
  } else {
#pragma unroll 1
    for (int c = 0; c < kCount; ++c, source += step, target += kPitch) {
      *target = c < existing ? *reinterpret_cast<const Word*>(source) : Word{};
    }
  }
}

// The words of two neighbouring positions of a pair of 16-bit rows.
struct RowWords {
  const uint16_t* even;  // of the even line
  const uint16_t* odd;
  bool has_first, has_second;  // which of the two positions exist

  __device__ __forceinline__ uint2 load() const {
    uint32_t elements[2][2] = {};
    if (has_first) {
      elements[0][0] = even[0];
      elements[0][1] = odd[0];
    }
    if (has_second) {
      elements[1][0] = even[1];
      elements[1][1] = odd[1];
    }
    return {__byte_perm(elements[0][0], elements[0][1], 0x5410), __byte_perm(elements[1][0], elements[1][1], 0x5410)};
  }
};

// target[i * kPitch] = the words of the thread's i-th channel for i < kCount; zero from `existing` on.
template <int kCount, int kPitch>
__device__ __forceinline__ void copy_row_words(uint32_t* target, RowWords words, int step, int existing) {
  const auto copy = [&](int i) {
    __syncwarp();  // lanes beyond the edges stay converged, so that the others' accesses remain one instruction
    *reinterpret_cast<uint2*>(target + i * kPitch) = words.load();
    const int next = rematerialize(step);
    words.even += next;
    words.odd += next;
  };
  if (existing >= kCount) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      copy(i);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) {
    words.has_first &= i < existing;
    words.has_second &= i < existing;
    copy(i);
  }
}

// tile[plane][c][p] = f(first_channel + c, first_position + p) for c < kChannels, p < kTile; zeros for channels and
// positions beyond the edges. Lines beyond the edge repeat the last line: their sums are not stored. The loads of a
// warp are contiguous in global memory. In 16-bit types a thread loads words of two lines where they are paired, two
// neighbouring positions of two lines for rows, and elements otherwise (columns of an odd width).
template <class T, class Shape, int kChannels>
__device__ __forceinline__ void load_line_tile(
    LineWord<T>* tile, const LineFeatures& f, const LineWindow& window, int first_channel, int first_position,
    int position_end) {
  constexpr int kLines = kLinesPerPlane<T>;
  first_channel = rematerialize(first_channel);
  first_position = rematerialize(first_position);
  const int words_per_plane = plane_words<Shape>(window.plane_bits, kChannels);
  const int bits = window.plane_bits + (kLines == 2), positions = position_end - first_position;
  const int last_line = window.line_end - 1 - rematerialize(window.first_line);
  const auto at = [&](int channel, int line, int position) {
    return element_at<T>(f, window, first_channel + channel, min(line, last_line), first_position + position);
  };
  if constexpr (kLines == 2) {
    if (f.paired) {
      const TileItem<Shape, 2, 1> item(f, bits);
      const int channels = item.position < positions ? f.channels - first_channel - item.channel : 0;
      copy_channels<uint32_t, kChannels / 2, 2 * Shape::kPitch>(
          tile + (item.line >> 1) * words_per_plane + item.channel * Shape::kPitch + item.position,
          at(item.channel, min(item.line, last_line & ~1), item.position), 2 * f.channel_stride, (channels + 1) / 2);
      return;
    }
    if (f.position_stride == 1) {
      const TileItem<Shape, 2, 2> item(f, bits);
      const T* even = at(item.channel, item.line, item.position);
      const T* odd = at(item.channel, item.line + 1, item.position);
      copy_row_words<kChannels / 4, 4 * Shape::kPitch>(
          tile + (item.line >> 1) * words_per_plane + item.channel * Shape::kPitch + item.position,
          {reinterpret_cast<const uint16_t*>(even), reinterpret_cast<const uint16_t*>(odd), item.position < positions,
           item.position + 1 < positions},
          4 * f.channel_stride, (f.channels - first_channel - item.channel + 3) / 4);
      return;
    }
  }
  const TileItem<Shape, 1, 1> item(f, bits);
  const int channels = item.position < positions ? f.channels - first_channel : 0;
  copy_channels<T, kChannels, kElementPitch<T, Shape>>(
      reinterpret_cast<T*>(tile) + tile_offset<T>(item.line, item.position, words_per_plane),
      at(0, item.line, item.position), f.channel_stride, channels);
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
};

// The elements of a word, which holds one element or those of two lines.
template <class T, class Word>
constexpr int kElements = sizeof(Word) / sizeof(T);

// target[i * step] = source[i * kPitch] as words of type Word, for i < min(kCount, existing). With kAccumulate, plus
// factors times what the target holds.
template <bool kAccumulate, class Word, int kCount, int kPitch, class T>
__device__ __forceinline__ void store_channels(
    T* target, const Word* source, int step, int existing, const Accumulator<T> (&factors)[kElements<T, Word>]) {
  const auto store = [&](T* to, Word word, Word old) {
    if constexpr (kAccumulate) {
      T* now = reinterpret_cast<T*>(&word);
      const T* before = reinterpret_cast<const T*>(&old);
#pragma unroll
      for (int e = 0; e < kElements<T, Word>; ++e) {
        now[e] = from_accumulator<T>(factors[e] * to_accumulator(before[e]) + to_accumulator(now[e]));
      }
    }
    *reinterpret_cast<Word*>(to) = word;
  };
  step = rematerialize(step);
  if (existing >= kCount) {
    constexpr int kBatch = sizeof(T) == 4 ? 2 : 4;  // loads in flight; four spill registers with TF32 on sm_80
    static_assert(kCount % kBatch == 0);
#pragma unroll
    for (int c = 0; c < kCount; c += kBatch) {
      T* targets[kBatch];
      Word old[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i, target += step) {
        targets[i] = target;
        if constexpr (kAccumulate) {
          old[i] = *reinterpret_cast<const Word*>(target);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        store(targets[i], source[(c + i) * kPitch], old[i]);
      }
    }
    return;
  }
#pragma unroll 1
  for (int c = 0; c < existing; ++c, target += step, source += kPitch) {
    store(target, *source, kAccumulate ? *reinterpret_cast<const Word*>(target) : Word{});
  }
}

// The inverse of load_line_tile: f(first_channel + c, first_position + p) = tile[plane][c][p] for c < kChannels, merged
// with the elements that f holds. first_position is position merge_position of `merge`.
template <class T, class Shape, int kChannels>
__device__ __forceinline__ void store_line_tile(
    const LineWord<T>* tile, const LineFeatures& f, const LineWindow& window, int first_channel, int channel_end,
    int first_position, int position_end, const LineMerge<T>& merge, int merge_position) {
  constexpr int kLines = kLinesPerPlane<T>;
  first_position = rematerialize(first_position);
  const int words_per_plane = plane_words<Shape>(window.plane_bits, kChannels);
  const int bits = window.plane_bits + (kLines == 2);
  const auto store = [&]<class Word, int kCount, int kPitch>(const auto& item, const Word* source) {
    constexpr int kStep = std::decay_t<decltype(item)>::kChannelStep;
    if (first_position + item.position >= position_end ||
        rematerialize(window.first_line) + item.line >= window.line_end) {
      return;
    }
    T* target = element_at<T>(f, window, first_channel + item.channel, item.line, first_position + item.position);
    const int existing = (channel_end - first_channel - item.channel + kStep - 1) / kStep;
    Accumulator<T> factors[kElements<T, Word>] = {};
    if (!merge.accumulate) {
      store_channels<false, Word, kCount, kPitch>(target, source, kStep * f.channel_stride, existing, factors);
      return;
    }
#pragma unroll
    for (int e = 0; e < kElements<T, Word>; ++e) {
      factors[e] = merge.factor(item.line + e, merge_position + item.position);
    }
    store_channels<true, Word, kCount, kPitch>(target, source, kStep * f.channel_stride, existing, factors);
  };
  if constexpr (kLines == 2) {
    if (f.paired) {
      const TileItem<Shape, 2, 1> item(f, bits);
      store.template operator()<uint32_t, kChannels / 2, 2 * Shape::kPitch>(
          item, tile + (item.line >> 1) * words_per_plane + item.channel * Shape::kPitch + item.position);
      return;
    }
  }
  const TileItem<Shape, 1, 1> item(f, bits);
  store.template operator()<T, kChannels, kElementPitch<T, Shape>>(
      item, reinterpret_cast<const T*>(tile) + tile_offset<T>(item.line, item.position, words_per_plane));
}

__device__ __forceinline__ void store_pair(double* pair, double low, double high) {
  *reinterpret_cast<double2*>(pair) = make_double2(low, high);
}

// Stores values[line][position] of two neighbouring positions of a pair of lines, whose planes are plane_words apart.
template <class T>
__device__ __forceinline__ void store_results(
    LineWord<T>* words, int plane_words, const Accumulator<T> (&values)[2][2]) {
  if constexpr (kLinesPerPlane<T> == 2) {
    uint2 pair;
    store_pair(reinterpret_cast<T*>(&pair.x), values[0][0], values[1][0]);
    store_pair(reinterpret_cast<T*>(&pair.y), values[0][1], values[1][1]);
    *reinterpret_cast<uint2*>(words) = pair;
  } else {
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      store_pair(words + line * plane_words, values[line][0], values[line][1]);
    }
  }
}

}  // namespace segattn::cuda
