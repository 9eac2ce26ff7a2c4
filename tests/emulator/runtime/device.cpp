// The CUDA runtime API of include/runtime_api.h, and launches with the limits of the chosen architecture.
#include "device.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <cxxabi.h>
#include <dlfcn.h>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "../include/launch_emulated.h"
#include "block.h"
#include "counters.h"
#include "execution.h"
#include "host.h"
#include "memory.h"
#include "random.h"
#include "trace.h"

namespace segattn::emulator {
namespace {

constexpr size_t operator""_KB(unsigned long long kilobytes) {
  return kilobytes * 1024;
}

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; multiprocessors of V100, T4, A100,
// RTX 3080 Ti, RTX 4090, H200, B200, RTX 5090.
constexpr Device kDevices[] = {
    {70, 80, 96_KB},  {75, 40, 64_KB},   {80, 108, 163_KB},  {86, 80, 99_KB},
    {89, 128, 99_KB}, {90, 132, 227_KB}, {100, 148, 227_KB}, {120, 170, 99_KB},
};
constexpr int kMaxThreadsPerBlock = 1024;
constexpr unsigned kMaxGrid[3] = {0x7fffffffu, 65535, 65535};
constexpr unsigned kMaxBlock[3] = {1024, 1024, 64};

Device find_device(int architecture, int multiprocessors) {
  for (Device found : kDevices) {
    if (found.architecture != architecture)
      continue;
    if (multiprocessors > 0)
      found.multiprocessors = multiprocessors;
    return found;
  }
  throw std::invalid_argument(
      "emulator: architecture " + std::to_string(architecture) + " is not one of 70, 75, 80, 86, 89, 90, 100, 120");
}

int environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != 0 ? std::atoi(text) : otherwise;
}

Device& chosen_device() {
  static Device chosen = find_device(environment("SEGATTN_EMULATED_ARCH", 90), environment("SEGATTN_EMULATED_SMS", 0));
  return chosen;
}

uint64_t& chosen_seed() {
  static uint64_t chosen = uint64_t(environment("SEGATTN_EMULATOR_SEED", 0));
  return chosen;
}

MmaRounding find_mma_rounding(const std::string& name) {
  if (name == "truncate")
    return MmaRounding::kTruncate;
  if (name == "nearest")
    return MmaRounding::kNearest;
  throw std::invalid_argument("emulator: the rounding of mma must be truncate or nearest (got " + name + ")");
}

MmaRounding& chosen_mma_rounding() {
  const char* name = std::getenv("SEGATTN_EMULATED_MMA_ROUNDING");
  static MmaRounding chosen = find_mma_rounding(name != nullptr && *name != 0 ? name : "truncate");
  return chosen;
}

std::mutex launch_mutex;  // one launch at a time, from any host thread
std::map<const void*, size_t> dynamic_shared_limits;
cudaError_t last_error = cudaSuccess;

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess)
    last_error = error;
  return error;
}

size_t dynamic_shared_limit(const void* kernel) {
  const auto found = dynamic_shared_limits.find(kernel);
  return found != dynamic_shared_limits.end() ? std::max(found->second, kSharedWithoutOptin) : kSharedWithoutOptin;
}

cudaError_t check(const LaunchRequest& request) {
  const unsigned grid[3] = {request.grid_size.x, request.grid_size.y, request.grid_size.z};
  const unsigned block_size[3] = {request.block_size.x, request.block_size.y, request.block_size.z};
  uint64_t threads = 1;
  for (int i = 0; i < 3; ++i) {
    if (grid[i] == 0 || grid[i] > kMaxGrid[i])
      return cudaErrorInvalidConfiguration;
    if (block_size[i] == 0 || block_size[i] > kMaxBlock[i])
      return cudaErrorInvalidConfiguration;
    threads *= block_size[i];
  }
  if (threads > kMaxThreadsPerBlock)
    return cudaErrorInvalidConfiguration;
  const unsigned cluster = request.cluster_size;
  if (cluster == 0 || cluster > kMaxBlocks || request.grid_size.x % cluster != 0 ||
      (cluster > 1 && device().architecture < 90)) {
    return cudaErrorInvalidClusterSize;
  }
  if (request.dynamic_shared_bytes > dynamic_shared_limit(request.kernel))
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

std::string kernel_name(const LaunchRequest& request) {
  Dl_info info{};
  if (dladdr(request.kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != request.kernel) {
    return request.name;
  }
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> readable(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), std::free);
  std::string name = status == 0 ? readable.get() : info.dli_sname;
  if (name.starts_with("void "))
    name.erase(0, 5);
  const size_t parameters = name.rfind('(');
  return parameters != std::string::npos && parameters > 0 ? name.substr(0, parameters) : name;
}

// A random order of the blocks, each exactly once.
class BlockOrder {
 public:
  BlockOrder(uint64_t blocks, Random& random) : blocks_(blocks), next_(random.next() % blocks), step_(1) {
    do {
      step_ = (uint64_t(random.next()) << 32 | random.next()) % blocks + 1;
    } while (std::gcd(step_, blocks) != 1);
  }
  uint64_t next() {
    const uint64_t result = next_;
    next_ = uint64_t((__uint128_t(next_) + step_) % blocks_);
    return result;
  }

 private:
  uint64_t blocks_, next_, step_;
};

}  // namespace

const Device& device() {
  return chosen_device();
}
void set_device(int architecture, int multiprocessors) {
  chosen_device() = find_device(architecture, multiprocessors);
}
uint64_t seed() {
  return chosen_seed();
}
void set_seed(uint64_t seed) {
  chosen_seed() = seed;
}
MmaRounding mma_rounding() {
  return chosen_mma_rounding();
}
void set_mma_rounding(const std::string& name) {
  chosen_mma_rounding() = find_mma_rounding(name);
}
MmaBlocks mma_blocks(int mma_depth) {
  // Since Hopper 32 bytes of an mma's contraction are added at once, before 16.
  return device().architecture >= 90 ? MmaBlocks{mma_depth, 25} : MmaBlocks{mma_depth / 2, 24};
}
std::string pending_error() {
  return last_error == cudaSuccess ? "" : cudaGetErrorString(last_error);
}
void reset_function_attributes() {
  dynamic_shared_limits.clear();
  last_error = cudaSuccess;
}

cudaError_t launch(const LaunchRequest& request) {
  const std::lock_guard lock(launch_mutex);
  if (const cudaError_t error = check(request); error != cudaSuccess)
    return record(error);
  if (launch_fails())
    return record(cudaErrorLaunchOutOfResources);

  take_memory_error();  // discards that of a launch that failed otherwise
  const auto begin = std::chrono::steady_clock::now();
  counters = LaunchCounters{};
  counters.kernel = kernel_name(request);
  counters.grid_size = request.grid_size;
  counters.block_size = request.block_size;
  counters.cluster_size = int(request.cluster_size);
  counters.arguments.assign(static_cast<const char*>(request.arguments), request.argument_bytes);
  counters.dynamic_shared_bytes = request.dynamic_shared_bytes;
  counters.architecture = device().architecture;
  counters.stream = reinterpret_cast<intptr_t>(request.stream);

  SharedMemory shared(request);
  counters.static_shared_bytes = shared.static_bytes();
  start_execution(request, counters.kernel);
  if constexpr (kTrace)
    trace::launch_started(shared.memory());

  const dim3& grid = request.grid_size;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const unsigned in_cluster = request.cluster_size;
  Random random(seed());
  BlockOrder order(blocks / in_cluster, random);
  for (uint64_t i = 0; i < blocks / in_cluster; ++i) {
    const uint64_t cluster = order.next(), first = cluster * in_cluster;
    if (!block_runs(first, blocks) && !block_runs(first + in_cluster - 1, blocks))
      continue;
    BlockVariables variables[kMaxBlocks];
    for (unsigned rank = 0; rank < in_cluster; ++rank) {
      const uint64_t index = first + rank;
      variables[rank] = {
          {unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)},
          request.block_size,
          request.grid_size,
          shared.dynamic(int(rank))};
    }
    shared.poison();
    run_cluster(variables, int(in_cluster), seed() * 0x100000001b3u + cluster);
    if (const std::string error = take_memory_error(); !error.empty()) {
      throw std::runtime_error("emulator: bad memory access in kernel " + counters.kernel + "\n  " + error);
    }
    if constexpr (kTrace)
      trace::block_finished();
  }
  if constexpr (kTrace)
    trace::launch_finished(counters);
  counters.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  remember(std::move(counters));
  return cudaSuccess;
}

}  // namespace segattn::emulator

using namespace segattn::emulator;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  count_call(__func__);
  return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaGetDevice(int* device) {
  if (call_fails(__func__))
    return record(cudaErrorInvalidValue);
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  if (call_fails(__func__))
    return record(cudaErrorInvalidValue);
  if (ordinal != 0)
    return record(cudaErrorInvalidDevice);
  const Device& d = device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = d.multiprocessors, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = d.architecture / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = d.architecture % 10, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = int(d.shared_per_block_optin), cudaSuccess;
  }
  return record(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (call_fails(__func__))
    return record(cudaErrorInvalidValue);
  if (value < 0 || size_t(value) > device().shared_per_block_optin)
    return record(cudaErrorInvalidValue);
  const std::lock_guard lock(launch_mutex);
  dynamic_shared_limits[kernel] = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (call_fails(__func__))
    return record(cudaErrorInvalidValue);
  const int code = code_architecture(device().architecture);
  if (code == 0)
    return record(cudaErrorNoKernelImageForDevice);
  attributes->ptxVersion = attributes->binaryVersion = code;
  return cudaSuccess;
}
