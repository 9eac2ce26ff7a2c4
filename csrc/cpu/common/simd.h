// SIMD layer of the CPU kernels: GCC/Clang vector extensions, one native register wide.
//
//   Vec<T>               kLanes<T> lanes of float, double, int32_t, ... (64 bytes with AVX-512, 32 with AVX2, else 16)
//   VecN<T, n>           n lanes; the compiler splits vectors wider than a register
//   load / store         unaligned; load_partial / store_partial access only the first `count` elements
//   broadcast<V>(x)      one value in all lanes; + - * / and comparisons are the language's operators
//   fma(a, b, c)         a * b + c, fused where the processor has FMA
//   max(a, b)            a > b ? a : b, so a NaN in `b` is kept
//   min(a, b)            a < b ? a : b, so a NaN in `b` is kept
//   select(mask, a, b)   lane-wise mask ? a : b
//   widen / narrow       float16, bfloat16, float32, float64 elements in memory <-> lanes of the accumulator type
//   transpose(rows)      square transpose in registers
//
// at::vec is not an option: it is part of ATen, outside the stable ABI, and costs seconds of compile time in each of
// the four builds of every file. This source serves SSE2, AVX2, AVX-512 and NEON. Intrinsics appear only where the
// language has no operation: float16 conversion, bfloat16 rounding, masked moves.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace segattn::cpu {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T, int n>
struct VecType {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};
template <class T, int n>
using VecN = typename VecType<T, n>::type;

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
using Vec = VecN<T, kLanes<T>>;

// The type of sums: double for double, float for every other T.
template <class T>
using AccumulatorOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class V>
inline V load(const void* source) {
  V result;
  std::memcpy(&result, source, sizeof(V));
  return result;
}

template <class V>
inline void store(void* target, V value) {
  std::memcpy(target, &value, sizeof(V));
}

template <class V>
using ElementOf = std::remove_cvref_t<decltype(std::declval<V>()[0])>;

template <class V>
inline constexpr int kWidthOf = static_cast<int>(sizeof(V) / sizeof(ElementOf<V>));

template <class To, class From>
inline To bit_cast_vector(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
namespace detail {

// The lowest `bytes` (0 .. 64) bits.
inline std::uint64_t byte_mask(std::int64_t bytes) {
  return bytes == 0 ? 0 : ~std::uint64_t{0} >> (64 - bytes);
}

}  // namespace detail
#endif

// The first `count` (0 .. width) elements; the other lanes are zero. Without masked moves this is a call of memcpy and
// a load that stalls on store forwarding.
template <class V>
inline V load_partial(const ElementOf<V>* source, std::int64_t count) {
  V result{};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const std::uint64_t mask = detail::byte_mask(count * static_cast<std::int64_t>(sizeof(ElementOf<V>)));
  if constexpr (sizeof(V) == 64) {
    result = bit_cast_vector<V>(_mm512_maskz_loadu_epi8(mask, source));
  } else if constexpr (sizeof(V) == 32) {
    result = bit_cast_vector<V>(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), source));
  } else {
    static_assert(sizeof(V) <= 16);
    const __m128i lanes = _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), source);
    std::memcpy(&result, &lanes, sizeof(V));
  }
#else
  std::memcpy(&result, source, static_cast<std::size_t>(count) * sizeof(ElementOf<V>));
#endif
  return result;
}

template <class V>
inline void store_partial(ElementOf<V>* target, V value, std::int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const std::uint64_t mask = detail::byte_mask(count * static_cast<std::int64_t>(sizeof(ElementOf<V>)));
  if constexpr (sizeof(V) == 64) {
    _mm512_mask_storeu_epi8(target, mask, bit_cast_vector<__m512i>(value));
  } else if constexpr (sizeof(V) == 32) {
    _mm256_mask_storeu_epi8(target, static_cast<__mmask32>(mask), bit_cast_vector<__m256i>(value));
  } else {
    static_assert(sizeof(V) <= 16);
    __m128i lanes{};
    std::memcpy(&lanes, &value, sizeof(V));
    _mm_mask_storeu_epi8(target, static_cast<__mmask16>(mask), lanes);
  }
#else
  std::memcpy(target, &value, static_cast<std::size_t>(count) * sizeof(ElementOf<V>));
#endif
}

template <class V>
inline V broadcast(ElementOf<V> value) {
  return value - V{};  // folds to a broadcast; value + V{} does not, as it turns -0 into 0
}

// GCC and Clang contract a * b + c within an expression at their default -ffp-contract.
template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}

template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V min(V a, V b) {
  return a < b ? a : b;
}

template <class M, class V>
inline V select(M mask, V a, V b) {
  return mask ? a : b;
}

// ---- Elements of any supported dtype <-> lanes of the accumulator type ------------------------------------

namespace detail {

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 2, std::uint16_t, T>;

template <int n>
inline VecN<float, n> widen_half(VecN<std::uint16_t, n> bits) {
#if defined(__AVX512F__)
  if constexpr (n == 16) {
    return bit_cast_vector<VecN<float, 16>>(_mm512_cvtph_ps(bit_cast_vector<__m256i>(bits)));
  }
#endif
#if defined(__F16C__)
  if constexpr (n == 8) {
    return bit_cast_vector<VecN<float, 8>>(_mm256_cvtph_ps(bit_cast_vector<__m128i>(bits)));
  }
#endif
  VecN<float, n> result;
  for (int i = 0; i < n; ++i) {
    result[i] = static_cast<float>(Half(bits[i], Half::from_bits()));
  }
  return result;
}

template <int n>
inline VecN<std::uint16_t, n> half_bits(VecN<float, n> value) {
#if defined(__AVX512F__)
  if constexpr (n == 16) {
    return bit_cast_vector<VecN<std::uint16_t, n>>(
        _mm512_cvtps_ph(bit_cast_vector<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
#if defined(__F16C__)
  if constexpr (n == 8) {
    return bit_cast_vector<VecN<std::uint16_t, n>>(
        _mm256_cvtps_ph(bit_cast_vector<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  VecN<std::uint16_t, n> result;
  for (int i = 0; i < n; ++i) {
    result[i] = static_cast<Half>(static_cast<float>(value[i])).x;
  }
  return result;
}

}  // namespace detail

// The bits of each lane rounded to bfloat16 (to nearest, ties to even; NaN stays NaN), in the low half of 32-bit lanes.
template <int n>
inline VecN<std::uint32_t, n> bfloat16_bits(VecN<float, n> value) {
  using U = VecN<std::uint32_t, n>;
#if defined(__AVX512BF16__)
  if constexpr (n == 16) {
    const __m256bh narrow = _mm512_cvtneps_pbh(bit_cast_vector<__m512>(value));
    return bit_cast_vector<U>(_mm512_cvtepu16_epi32(bit_cast_vector<__m256i>(narrow)));
  }
#endif
  const U bits = bit_cast_vector<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (value == value) ? rounded : U{} + 0x7fc0u;
}

namespace detail {

template <class T, int n>
inline VecN<AccumulatorOf<T>, n> widen_bits(VecN<BitsOf<T>, n> bits) {
  if constexpr (std::is_same_v<T, Half>) {
    return widen_half<n>(bits);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return bit_cast_vector<VecN<float, n>>(__builtin_convertvector(bits, VecN<std::uint32_t, n>) << 16);
  } else {
    return bits;
  }
}

template <class T, int n>
inline VecN<BitsOf<T>, n> narrow_bits(VecN<AccumulatorOf<T>, n> value) {
  if constexpr (std::is_same_v<T, Half>) {
    return half_bits<n>(value);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __builtin_convertvector(bfloat16_bits<n>(value), VecN<std::uint16_t, n>);
  } else {
    return value;
  }
}

}  // namespace detail

// n elements of any dtype as accumulator lanes.
template <int n, class T>
inline VecN<AccumulatorOf<T>, n> widen(const T* source) {
  return detail::widen_bits<T, n>(load<VecN<detail::BitsOf<T>, n>>(source));
}

// The first `count` elements; the other lanes are zero.
template <int n, class T>
inline VecN<AccumulatorOf<T>, n> widen_partial(const T* source, std::int64_t count) {
  using Bits = detail::BitsOf<T>;
  return detail::widen_bits<T, n>(load_partial<VecN<Bits, n>>(reinterpret_cast<const Bits*>(source), count));
}

// Rounds n accumulator lanes to T (to nearest, ties to even) and stores them.
template <int n, class T>
inline void narrow(T* target, VecN<AccumulatorOf<T>, n> value) {
  store(target, detail::narrow_bits<T, n>(value));
}

template <int n, class T>
inline void narrow_partial(T* target, VecN<AccumulatorOf<T>, n> value, std::int64_t count) {
  store_partial(reinterpret_cast<detail::BitsOf<T>*>(target), detail::narrow_bits<T, n>(value), count);
}

// A vector of elements, of which only the first `count` are read if `count` is less than a vector.
template <class T>
inline Vec<AccumulatorOf<T>> read_vector(const T* source, std::int64_t count) {
  constexpr int n = kLanes<AccumulatorOf<T>>;
  return count >= n ? widen<n>(source) : widen_partial<n>(source, count);
}

// The counterpart: writes only the first `count` elements if `count` is less than a vector.
template <class T>
inline void write_vector(T* target, Vec<AccumulatorOf<T>> vector, std::int64_t count) {
  constexpr int n = kLanes<AccumulatorOf<T>>;
  if (count >= n) {
    narrow<n>(target, vector);
  } else {
    narrow_partial<n>(target, vector, count);
  }
}

// ---- Square transposes in registers -------------------------------------------------------------------------

namespace detail {

// A butterfly stage: swaps the off-diagonal distance x distance blocks of `low` (row i) and `high` (row i + distance).
template <int distance, class V, std::size_t... lane>
inline void transpose_stage(V& low, V& high, std::index_sequence<lane...>) {
  constexpr int n = sizeof...(lane);
  const V new_low = __builtin_shufflevector(low, high, ((lane & distance) ? n + int(lane) - distance : int(lane))...);
  const V new_high = __builtin_shufflevector(low, high, ((lane & distance) ? n + int(lane) : int(lane) + distance)...);
  low = new_low;
  high = new_high;
}

template <int distance, class V, int n>
inline void transpose_stages(V (&rows)[n]) {
  if constexpr (distance < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if ((i & distance) == 0) {
        transpose_stage<distance>(rows[i], rows[i | distance], std::make_index_sequence<n>{});
      }
    }
    transpose_stages<distance * 2>(rows);
  }
}

}  // namespace detail

// Swaps rows[i][j] and rows[j][i]; n (4, 8 or 16) rows of n lanes.
template <class V, int n>
inline void transpose(V (&rows)[n]) {
  static_assert(kWidthOf<V> == n);
  detail::transpose_stages<1>(rows);
}

}  // namespace segattn::cpu
