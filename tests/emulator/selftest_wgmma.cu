// Matrix products of a warpgroup: single instructions on the test's data, and kernels with one fault each and their
// corrected twins (tests/tools/test_emulator_wgmma.py).
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx_sm90.cuh"
#include "selftest.h"

namespace segattn::selftest {

namespace ptx = cuda::ptx;
using cuda::launch_kernel;
using ptx::MatrixMajor;

namespace {

constexpr int kThreads = 128;

// The head of the input: words of a product's parameters.
struct Parameters {
  int a_start, a_chunk, a_stride, a_advance;  // in bytes; the advance is added to the descriptor
  int b_start, b_chunk, b_stride, b_advance;
  int accumulates;
  int products;  // of the same operands, into the same accumulators
  int unused[6];
};

__device__ void fill_shared(char* shared, const char* from, int bytes) {
  for (int i = 4 * int(threadIdx.x); i < bytes; i += 4 * kThreads)
    *reinterpret_cast<uint32_t*>(shared + i) = *reinterpret_cast<const uint32_t*>(from + i);
}

// in: Parameters; the bytes of shared memory (size); registers a [128][4]; accumulators [128][kTiles][4].
// out: accumulators [128][kTiles][4]
template <class T, bool kARegisters, MatrixMajor kMajorA, MatrixMajor kMajorB, int kTiles>
__global__ void product(const float* in, float* out, int size) {
  SEGATTN_DYNAMIC_SHARED(char, shared);
  const auto& p = *reinterpret_cast<const Parameters*>(in);
  const int t = int(threadIdx.x);
  const float* registers = in + (int(sizeof p) + size) / 4;
  fill_shared(shared, reinterpret_cast<const char*>(in) + sizeof p, size);
  uint32_t a[4];
  float d[kTiles][4];
  for (int i = 0; i < 4; ++i)
    a[i] = __float_as_uint(registers[4 * t + i]);
  for (int j = 0; j < kTiles; ++j) {
    for (int i = 0; i < 4; ++i)
      d[j][i] = registers[4 * kThreads + 4 * (kTiles * t + j) + i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  const uint64_t b_operand = ptx::matrix_descriptor(shared + p.b_start, p.b_chunk, p.b_stride) + (p.b_advance >> 4);
  ptx::wgmma_fence();
  for (int i = 0; i < p.products; ++i) {
    if constexpr (kARegisters) {
      ptx::wgmma<T, kMajorB>(d, a, b_operand, p.accumulates != 0);
    } else {
      const uint64_t a_operand = ptx::matrix_descriptor(shared + p.a_start, p.a_chunk, p.a_stride) + (p.a_advance >> 4);
      ptx::wgmma<T, kMajorA, kMajorB>(d, a_operand, b_operand, p.accumulates != 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int j = 0; j < kTiles; ++j) {
    for (int i = 0; i < 4; ++i)
      out[4 * (kTiles * t + j) + i] = d[j][i];
  }
}

// in: registers [32][4]; out: 32 rows of 8 16-bit elements
__global__ void store_matrix(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, rows);
  const int lane = int(threadIdx.x);
  uint32_t r[4];
  for (int i = 0; i < 4; ++i)
    r[i] = __float_as_uint(in[4 * lane + i]);
  ptx::stmatrix_x4_trans(rows + 4 * lane, r);
  __syncwarp();
  for (int i = 0; i < 4; ++i)
    out[4 * lane + i] = rows[4 * lane + i];
}

// ---- faults -----------------------------------------------------------------------------------------------------

enum class Fault {
  kNone,
  kNoWait,               // reads the accumulators before the wait
  kWeakWait,             // waits for all groups but the newest
  kAccumulatorsWritten,  // writes the accumulators before the wait
  kARewritten,           // writes a's registers before the wait
  kAOutOfScope,          // a's registers are an array that ends before the product
  kOperandRewritten,     // writes the shared operand before the wait
  kRefill,               // writes the shared operand when its own warp has finished, but others may not have
  kNoFence,              // no wgmma_fence before the first product
  kNoSecondFence,        // none after the accumulators were written
  kLateAFence,           // a's registers are written after the wgmma_fence
  kNotCommitted,
  kNotWaited,
  kNoProxyFence,
  kLateProxyFence,  // after the barrier instead of before it
  kUnwritten,       // a row of b is not written
  kDivergentLine,
  kDivergentDescriptor,
  kDivergentCount,  // a warp executes one product less
  kDivergentWarp,   // in one warp, some lanes are at another product
  kOtherShape,      // a product of 64 x 64 into the first half of accumulators in flight
  kMisalignedStart,
  kMisalignedAtom,
  kOutside,
  kNoFullWait,      // reads a stage without waiting for its copy
  kEarlyRelease,    // hands a stage back before the products that read it have finished
  kOneWarpRelease,  // hands it back when one of the four warps has finished
};

constexpr int kTileBytes = 64 * 128;

// (row, k) of a 64 x 64 tile with 128-byte swizzle
__device__ __half& element(char* tile, int row, int k) {
  return *reinterpret_cast<__half*>(tile + row * 128 + (k / 8 ^ row % 8) * 16 + k % 8 * 2);
}

// in: [64][64]; each warp writes every fourth row
__device__ void store_tile(char* tile, const float* in, float scale, int rows) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int row = warp; row < rows; row += 4) {
    for (int k = lane; k < 64; k += 32) {
      const __half value = __float2half_rn(scale * in[64 * row + k]);
      element(tile, row, k) = value;
    }
  }
}

// a's registers of the k-th step of 16 of the contraction
__device__ void load_a(uint32_t (&a)[4], const float* in, int step) {
  const int row = int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4, column = 16 * step + int(threadIdx.x) % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const float* from = in + 64 * (row + i % 2 * 8) + column + i / 2 * 8;
    const __half2 pair = __floats2half2_rn(from[0], from[1]);
    a[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// out: [64][64]; the first 64 columns
template <int kTiles>
__device__ void store_sums(float* out, const float (&d)[kTiles][4]) {
  const int row = int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4, column = int(threadIdx.x) % 4 * 2;
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 4; ++i)
      out[64 * (row + i / 2 * 8) + 8 * j + column + i % 2] = d[j][i];
  }
}

// out (64 x 64) = 3 a b^T + 1, in two passes: the second with 2 b. in: a, b, both [64][64].
template <Fault kFault, bool kARegisters>
__global__ void two_passes(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(char, shared);
  char *a_tile = shared, *b_tile = shared + kTileBytes;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  float d[8][4];
  uint32_t a[4][4];
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 4; ++i)
      d[j][i] = 0;
  }
  if constexpr (kARegisters) {
    for (int step = 0; step < 4; ++step)
      load_a(a[step], in, step);
  } else {
    store_tile(a_tile, in, 1, 64);
  }
  const uint32_t b_start = kFault == Fault::kMisalignedStart ? 16 : kFault == Fault::kMisalignedAtom ? 128 : 0;
  const uint32_t b_stride = kFault == Fault::kOutside ? 2048 : 1024;
  const int wrong_warp = kFault == Fault::kDivergentDescriptor && warp == 2 ? 2 : 0;
  const uint64_t a_operand = ptx::matrix_descriptor(a_tile, 0, 1024);
  const uint64_t b_operand = ptx::matrix_descriptor(b_tile + b_start, 0, b_stride) + wrong_warp;
  for (int pass = 0; pass < 2; ++pass) {
    store_tile(b_tile, in + 64 * 64, float(pass + 1), kFault == Fault::kUnwritten ? 63 : 64);
    if constexpr (kFault != Fault::kNoProxyFence && kFault != Fault::kLateProxyFence)
      ptx::fence_proxy_async();
    __syncthreads();
    if constexpr (kFault == Fault::kLateProxyFence)
      ptx::fence_proxy_async();
    if (kFault != Fault::kNoFence && !(kFault == Fault::kNoSecondFence && pass == 1))
      ptx::wgmma_fence();
    if constexpr (kFault == Fault::kLateAFence)
      load_a(a[0], in, 0);
    const int steps = kFault == Fault::kDivergentCount && warp == 1 && pass == 1 ? 3 : 4;
    for (int step = 0; step < steps; ++step) {
      if constexpr (kFault == Fault::kAOutOfScope) {
        uint32_t short_lived[4];
        load_a(short_lived, in, step);
        ptx::wgmma_fence();
        ptx::wgmma<__half, MatrixMajor::kK>(d, short_lived, b_operand + 2 * step, true);
      } else if constexpr (kARegisters) {
        ptx::wgmma<__half, MatrixMajor::kK>(d, a[step], b_operand + 2 * step, true);
      } else if ((kFault == Fault::kDivergentLine && warp == 3) || (kFault == Fault::kDivergentWarp && lane == 7)) {
        ptx::wgmma<__half, MatrixMajor::kK, MatrixMajor::kK>(d, a_operand + 2 * step, b_operand + 2 * step, true);
      } else {
        ptx::wgmma<__half, MatrixMajor::kK, MatrixMajor::kK>(d, a_operand + 2 * step, b_operand + 2 * step, true);
      }
      if (kFault == Fault::kWeakWait && step == 2)
        ptx::wgmma_commit();
    }
    if constexpr (kFault == Fault::kNotCommitted) {
      ptx::wgmma_wait<0>();
      return;
    }
    ptx::wgmma_commit();
    if constexpr (kFault == Fault::kNotWaited)
      return;
    if constexpr (kFault == Fault::kNoWait)
      store_sums(out, d);
    if constexpr (kFault == Fault::kAccumulatorsWritten)
      d[7][3] = 1;
    if constexpr (kFault == Fault::kARewritten)
      a[3][3] = 0;
    if (kFault == Fault::kOperandRewritten && threadIdx.x == 0)
      element(b_tile, 0, 0) = __half();
    ptx::wgmma_wait<kFault == Fault::kWeakWait ? 1 : 0>();
    if constexpr (kFault == Fault::kNoWait)
      return;
    if constexpr (kFault != Fault::kRefill)
      __syncthreads();
    if (pass == 0) {
      for (int j = 0; j < 8; ++j) {
        for (int i = 0; i < 4; ++i)
          d[j][i] += 1;
      }
    }
  }
  store_sums(out, d);
}

// out (64 x 64) = a b^T as half of a product of 64 x 128. Broken: a product of another shape into the same
// accumulators.
template <Fault kFault>
__global__ void two_shapes(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(char, shared);
  store_tile(shared, in, 1, 64);
  store_tile(shared + kTileBytes, in + 64 * 64, 1, 64);
  store_tile(shared + 2 * kTileBytes, in, 1, 64);
  ptx::fence_proxy_async();
  __syncthreads();
  float d[16][4];
  const uint64_t a = ptx::matrix_descriptor(shared, 0, 1024), b = ptx::matrix_descriptor(shared + kTileBytes, 0, 1024);
  ptx::wgmma_fence();
  for (int step = 0; step < 4; ++step) {
    ptx::wgmma<__half, MatrixMajor::kK, MatrixMajor::kK>(d, a + 2 * step, b + 2 * step, step > 0);
    if (kFault == Fault::kOtherShape) {
      auto& half = *reinterpret_cast<float(*)[8][4]>(&d);
      ptx::wgmma<__half, MatrixMajor::kK, MatrixMajor::kK>(half, a, b, true);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  store_sums(out, d);
}

struct PipelineParameters {
  CUtensorMap map;
  float* out;
  int steps;
};

// out (64 x 64) = a b^T over steps of 64 of the contraction, through a ring of two stages that warp 4 fills.
template <Fault kFault>
__global__ void pipeline(const __grid_constant__ PipelineParameters p) {
  constexpr int kStages = 2, kReleases = kFault == Fault::kOneWarpRelease ? 1 : 4;
  SEGATTN_DYNAMIC_SHARED(char, shared);
  auto* full = reinterpret_cast<uint64_t*>(shared + kStages * 2 * kTileBytes);
  uint64_t* empty = full + kStages;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full + stage, 1);
      ptx::mbarrier_init(empty + stage, kReleases);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (warp >= 4) {
    for (int step = 0; threadIdx.x == 128 && step < p.steps; ++step) {
      const int stage = step % kStages;
      ptx::mbarrier_wait(empty + stage, step / kStages % 2 ^ 1);
      ptx::mbarrier_arrive_expect(full + stage, 2 * kTileBytes);
      ptx::copy_box(shared + stage * 2 * kTileBytes, &p.map, 64 * step, 0, 0, full + stage);
    }
    return;
  }
  float d[8][4];
  for (int step = 0; step < p.steps; ++step) {
    const int stage = step % kStages;
    const char* tile = shared + stage * 2 * kTileBytes;
    if constexpr (kFault != Fault::kNoFullWait)
      ptx::mbarrier_wait(full + stage, step / kStages % 2);
    const uint64_t a = ptx::matrix_descriptor(tile, 0, 1024), b = ptx::matrix_descriptor(tile + kTileBytes, 0, 1024);
    ptx::wgmma_fence();
    for (int k = 0; k < 4; ++k)
      ptx::wgmma<__half, MatrixMajor::kK, MatrixMajor::kK>(d, a + 2 * k, b + 2 * k, step + k > 0);
    ptx::wgmma_commit();
    if constexpr (kFault != Fault::kEarlyRelease)
      ptx::wgmma_wait<0>();
    if (lane == 0 && warp < kReleases)
      ptx::mbarrier_arrive(empty + stage);
    if constexpr (kFault == Fault::kEarlyRelease)
      ptx::wgmma_wait<0>();
  }
  store_sums(p.out, d);
}

template <Fault kFault>
Case pipeline_with(const char* name) {
  return {name, [](bool broken, const Buffers& b) {
            // 128 rows of 16-bit elements, those of a and then of b
            const cuuint64_t sizes[] = {cuuint64_t(b.size), 128, 1};
            const cuuint64_t strides[] = {cuuint64_t(2 * b.size), cuuint64_t(2 * 128 * b.size)};
            const cuuint32_t box[] = {64, 128, 1}, element_strides[] = {1, 1, 1};
            PipelineParameters p{{}, b.out, b.size / 64};
            cuTensorMapEncodeTiled(
                &p.map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<float*>(b.in), sizes, strides, box,
                element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
            launch_kernel(
                broken ? pipeline<kFault> : pipeline<Fault::kNone>, "pipeline", 1, 2 * kThreads,
                size_t(4 * kTileBytes + 32), nullptr, p);
          }};
}

template <Fault kFault, bool kARegisters = false>
Case two_passes_with(const char* name, int threads = kThreads) {
  return {name, [threads](bool broken, const Buffers& b) {
            launch_kernel(
                broken ? two_passes<kFault, kARegisters> : two_passes<Fault::kNone, kARegisters>, "two_passes", 1,
                broken ? threads : kThreads, size_t(2 * kTileBytes), nullptr, b.in, b.out, b.size);
          }};
}

template <class T, bool kARegisters, MatrixMajor kMajorA, MatrixMajor kMajorB>
void add_products(std::vector<Case>& all, const std::string& name) {
  const auto add = [&]<int kTiles>() {
    all.push_back({name + "_" + std::to_string(8 * kTiles), [](bool, const Buffers& b) {
                     cudaFuncSetAttribute(
                         reinterpret_cast<const void*>(product<T, kARegisters, kMajorA, kMajorB, kTiles>),
                         cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024);
                     launch_kernel(
                         product<T, kARegisters, kMajorA, kMajorB, kTiles>, "product", 1, kThreads, size_t(b.size),
                         nullptr, b.in, b.out, b.size);
                   }});
  };
  add.template operator()<8>();
  add.template operator()<16>();
  add.template operator()<32>();
}

template <class T>
void add_products(std::vector<Case>& all, const std::string& type) {
  using enum MatrixMajor;
  add_products<T, false, kK, kK>(all, "wgmma_" + type + "_k_k");
  add_products<T, false, kK, kMn>(all, "wgmma_" + type + "_k_mn");
  add_products<T, false, kMn, kK>(all, "wgmma_" + type + "_mn_k");
  add_products<T, false, kMn, kMn>(all, "wgmma_" + type + "_mn_mn");
  add_products<T, true, kK, kK>(all, "wgmma_" + type + "_registers_k");
  add_products<T, true, kK, kMn>(all, "wgmma_" + type + "_registers_mn");
}

}  // namespace

const std::vector<Case>& wgmma_instructions() {
  static const std::vector<Case> all = [] {
    std::vector<Case> cases;
    add_products<__half>(cases, "float16");
    add_products<__nv_bfloat16>(cases, "bfloat16");
    cases.push_back({"stmatrix_x4_trans", [](bool, const Buffers& b) {
                       launch_kernel(store_matrix, "store_matrix", 1, 32, 512, nullptr, b.in, b.out, b.size);
                     }});
    return cases;
  }();
  return all;
}

const std::vector<Case>& wgmma_cases() {
  static const std::vector<Case> all = {
      two_passes_with<Fault::kNoWait>("no_wait"),
      two_passes_with<Fault::kWeakWait>("weak_wait"),
      two_passes_with<Fault::kAccumulatorsWritten>("accumulators_written"),
      two_passes_with<Fault::kARewritten, true>("a_rewritten"),
      two_passes_with<Fault::kAOutOfScope, true>("a_out_of_scope"),
      two_passes_with<Fault::kOperandRewritten>("operand_rewritten"),
      two_passes_with<Fault::kRefill>("refill"),
      two_passes_with<Fault::kNoFence>("no_fence"),
      two_passes_with<Fault::kNoSecondFence>("no_second_fence"),
      two_passes_with<Fault::kLateAFence, true>("late_a_fence"),
      two_passes_with<Fault::kNotCommitted>("not_committed"),
      two_passes_with<Fault::kNotWaited>("not_waited"),
      two_passes_with<Fault::kNoProxyFence>("no_proxy_fence"),
      two_passes_with<Fault::kLateProxyFence>("late_proxy_fence"),
      two_passes_with<Fault::kUnwritten>("unwritten_operand"),
      two_passes_with<Fault::kDivergentLine>("divergent_line"),
      two_passes_with<Fault::kDivergentDescriptor>("divergent_descriptor"),
      two_passes_with<Fault::kDivergentCount>("divergent_count"),
      two_passes_with<Fault::kDivergentWarp>("divergent_warp"),
      two_passes_with<Fault::kMisalignedStart>("misaligned_start"),
      two_passes_with<Fault::kMisalignedAtom>("misaligned_atom"),
      two_passes_with<Fault::kOutside>("outside"),
      two_passes_with<Fault::kNone>("partial_warpgroup", 96),
      pipeline_with<Fault::kNoFullWait>("no_full_wait"),
      pipeline_with<Fault::kEarlyRelease>("early_release"),
      pipeline_with<Fault::kOneWarpRelease>("one_warp_release"),
      {"other_shape",
       [](bool broken, const Buffers& b) {
         launch_kernel(
             broken ? two_shapes<Fault::kOtherShape> : two_shapes<Fault::kNone>, "two_shapes", 1, kThreads,
             size_t(3 * kTileBytes), nullptr, b.in, b.out, b.size);
       }},
  };
  return all;
}

}  // namespace segattn::selftest
