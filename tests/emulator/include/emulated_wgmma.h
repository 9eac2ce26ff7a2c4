// The emulated twins of the matrix products of a warpgroup in csrc/cuda/common/ptx_sm90.cuh (runtime/wgmma.cpp), and of
// stmatrix (runtime/mma.cpp). Included by emulated_ptx_sm90.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

namespace segattn::emulator {

// One product as a thread of the warpgroup issues it. A null a_registers means a from shared memory.
struct WgmmaOperands {
  MmaType type;
  int tiles;  // of 8 columns
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;  // descriptors
  bool a_mn_major, b_mn_major;
  bool accumulates;
};

void wgmma(const WgmmaOperands& operands, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int groups_left, Site site);

// Fields as in the PTX ISA; the address is the offset in the block's dynamic shared memory.
uint64_t matrix_descriptor(const void* start, uint32_t chunk_bytes, uint32_t stride_bytes, Site site);

// The running thread's generic writes to shared memory become visible to asynchronous accesses.
void fence_proxy_async(Site site);

// Four 8x8 matrices of 16-bit elements, each stored transposed; `row` is the row whose address this lane gives.
void store_matrices_transposed(void* row, const uint32_t* registers, Site site);

}  // namespace segattn::emulator

namespace segattn::cuda::ptx {

enum class MatrixMajor { kK = 0, kMn = 1 };

inline uint64_t matrix_descriptor(
    const void* start, uint32_t chunk_bytes, uint32_t stride_bytes, emulator::Site site = emulator::Site::current()) {
  return emulator::matrix_descriptor(start, chunk_bytes, stride_bytes, site);
}

inline void fence_proxy_async(emulator::Site site = emulator::Site::current()) {
  emulator::fence_proxy_async(site);
}

inline void wgmma_fence(emulator::Site site = emulator::Site::current()) {
  emulator::wgmma_fence(site);
}
inline void wgmma_commit(emulator::Site site = emulator::Site::current()) {
  emulator::wgmma_commit(site);
}
template <int N>
inline void wgmma_wait(emulator::Site site = emulator::Site::current()) {
  static_assert(N >= 0 && N <= 7);
  emulator::wgmma_wait(N, site);
}

// The runtime's functions are opaque to the compiler, so it moves no access to accumulators across them.
template <int kTiles>
inline void hold(float (&)[kTiles][4]) {}

template <class T>
constexpr emulator::MmaType wgmma_type() {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  return std::is_same_v<T, __half> ? emulator::MmaType::kFloat16 : emulator::MmaType::kBfloat16;
}

// a and b from shared memory.
template <class T, MatrixMajor kMajorA, MatrixMajor kMajorB, int kTiles>
inline void wgmma(
    float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulates, emulator::Site site = emulator::Site::current()) {
  static_assert(kTiles == 8 || kTiles == 16 || kTiles == 32);
  emulator::wgmma(
      {wgmma_type<T>(), kTiles, d[0], nullptr, a, b, kMajorA == MatrixMajor::kMn, kMajorB == MatrixMajor::kMn,
       accumulates},
      site);
}

// a from registers, which must live until the wait.
template <class T, MatrixMajor kMajorB, int kTiles>
inline void wgmma(
    float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulates,
    emulator::Site site = emulator::Site::current()) {
  static_assert(kTiles == 8 || kTiles == 16 || kTiles == 32);
  emulator::wgmma({wgmma_type<T>(), kTiles, d[0], a, 0, b, false, kMajorB == MatrixMajor::kMn, accumulates}, site);
}

inline void stmatrix_x4_trans(
    void* shared_row, const uint32_t (&r)[4], emulator::Site site = emulator::Site::current()) {
  emulator::store_matrices_transposed(shared_row, r, site);
}

}  // namespace segattn::cuda::ptx
