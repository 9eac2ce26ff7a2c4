// Kernel launches in the emulator. csrc/cuda/common/launch.cuh forwards to them when SEGATTN_EMULATED is defined.
#pragma once

#include <cstddef>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"
#include "runtime_api.h"

namespace segattn::emulator {

struct LaunchRequest {
  const void* kernel;
  const char* name;  // for a kernel whose symbol cannot be found
  dim3 grid_size;
  dim3 block_size;
  unsigned cluster_size;  // blocks along x that run together
  size_t dynamic_shared_bytes;
  cudaStream_t stream;
  void (*run_thread)(const void* kernel, const void* arguments);
  const void* arguments;
  size_t argument_bytes;
};

// Checks the request as a GPU does and runs every block. cudaGetLastError then returns the same error. Throws
// std::runtime_error for a fault of the kernel: a deadlock, a race, a misaligned access.
cudaError_t launch(const LaunchRequest& request);

template <class... P, class... A>
cudaError_t launch(
    const char* name, void (*kernel)(P...), unsigned cluster_size, dim3 grid_size, dim3 block_size,
    size_t dynamic_shared_bytes, cudaStream_t stream, A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each of the kernel's parameters");
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernel parameters are copied to the device bit by bit");
  using Arguments = std::tuple<P...>;
  const Arguments packed(static_cast<P>(std::forward<A>(arguments))...);
  const auto run_thread = [](const void* function, const void* values) {
    std::apply(reinterpret_cast<void (*)(P...)>(const_cast<void*>(function)), *static_cast<const Arguments*>(values));
  };
  return launch(LaunchRequest{
      reinterpret_cast<const void*>(kernel), name, grid_size, block_size, cluster_size, dynamic_shared_bytes, stream,
      run_thread, &packed, sizeof packed});
}

// The block's dynamic shared memory, exactly as many bytes as the launch requests.
inline void* dynamic_shared_memory() {
  return current->block->dynamic_shared;
}

}  // namespace segattn::emulator
