// Kernel launches and dynamic shared memory: the constructs of CUDA for which plain C++ has no syntax.
//
//   SEGATTN_DYNAMIC_SHARED(type, name);    in a kernel: `type* name`, a block's dynamic shared memory, 16-byte aligned
//   SEGATTN_LAUNCH((kernel<1, 2>), grid, block, shared_bytes, stream, arguments...);
//   SEGATTN_LAUNCH_CLUSTER((kernel<1, 2>), cluster_size, grid, block, shared_bytes, stream, arguments...);
//
// A launch opts in to more than 48 KB of shared memory where needed, and throws std::runtime_error naming the kernel if
// it fails. Nothing here synchronises, so launches can be captured into a CUDA graph.
//
// Under SEGATTN_EMULATED, "launch_emulated.h" (tests/emulator) implements them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

#ifdef SEGATTN_EMULATED
#include "launch_emulated.h"
#define SEGATTN_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::segattn::emulator::dynamic_shared_memory())
#else
// A translation unit can declare the extern array with one type only, so every type is cast from the same array.
#define SEGATTN_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char segattn_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(segattn_dynamic_shared)
#endif

namespace segattn::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // forgets the error, which the next launch would report as its own, PyTorch's included
    throw std::runtime_error(std::string("segattn_ops: ") + what + " failed: " + cudaGetErrorString(error));
  }
}

// All grids are one-dimensional: the y and z dimensions are limited to 65,535 blocks.
inline unsigned grid_blocks(int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error("segattn_ops: " + std::to_string(blocks) + " blocks are more than a launch can have");
  }
  return static_cast<unsigned>(blocks);
}

// cluster_size: so many blocks, which follow each other in x, run together as a cluster (sm_90).
template <class... Parameters, class... Arguments>
void launch_cluster(
    void (*kernel)(Parameters...), const char* name, unsigned cluster_size, dim3 grid, dim3 block, size_t shared_bytes,
    cudaStream_t stream, const Arguments&... arguments) {
  constexpr size_t kWithoutOptIn = 48 * 1024;
  if (shared_bytes > kWithoutOptIn) {
    check_cuda(
        cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(shared_bytes)),
        name);
  }
#ifdef SEGATTN_EMULATED
  check_cuda(emulator::launch(name, kernel, cluster_size, grid, block, shared_bytes, stream, arguments...), name);
#else
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = cluster_size > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
#endif
}

template <class... Parameters, class... Arguments>
void launch_kernel(
    void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
    const Arguments&... arguments) {
  launch_cluster(kernel, name, 1, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace segattn::cuda

#define SEGATTN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::segattn::cuda::launch_kernel(kernel, #kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define SEGATTN_LAUNCH_CLUSTER(kernel, cluster_size, grid, block, shared_bytes, stream, ...) \
  ::segattn::cuda::launch_cluster(kernel, #kernel, cluster_size, grid, block, shared_bytes, stream, __VA_ARGS__)
