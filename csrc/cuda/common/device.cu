#include <atomic>
#include <sstream>

#include <torch/csrc/stable/library.h>

#include "cuda/common/device.h"
#include "registration.h"

#ifdef SEGATTN_EMULATED
#include "emulator.h"
#endif

namespace segattn::cuda {
namespace {

std::atomic<bool> tf32_allowed{false};

void set_allow_tf32(bool allow) {
  tf32_allowed.store(allow, std::memory_order_relaxed);
}

__global__ void probe_kernel() {}

// "sm_80, sm_90"
std::string built_architectures() {
#ifdef SEGATTN_EMULATED
  const std::vector<int> built = emulator::built_architectures();
  constexpr int kUnit = 1;
#else
  constexpr int built[] = {__CUDA_ARCH_LIST__};
  constexpr int kUnit = 10;
#endif
  std::string text;
  for (const int architecture : built) {
    text += (text.empty() ? "sm_" : ", sm_") + std::to_string(architecture / kUnit);
  }
  return text;
}

// The architecture of the code that the driver selects for the current device.
int code_architecture(int major, int minor) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    std::ostringstream message;
    message << "segattn_ops: the CUDA kernels were built for " << built_architectures() << ", this device is sm_"
            << major << minor << "; build for it with TORCH_CUDA_ARCH_LIST=\"" << major << "." << minor
            << "\" pip install --no-build-isolation . in the source tree";
    throw std::runtime_error(message.str());
  }
  check_cuda(error, "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

DeviceLimits device_limits() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  return {
      code_architecture(major, minor), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      attribute(cudaDevAttrMultiProcessorCount, device), 10 * major + minor};
}

bool has_sm90a_code() {
#ifdef SEGATTN_EMULATED
  return emulator::built_for_sm90a();
#else
  return kHasSm90aFiles;
#endif
}

bool allow_tf32() {
  return tf32_allowed.load(std::memory_order_relaxed);
}

}  // namespace segattn::cuda

// The stable ABI does not expose torch.backends.cuda.matmul's setting, so the Python layer passes on its changes.
STABLE_TORCH_LIBRARY_FRAGMENT(SEGATTN_NAMESPACE, m) {
  m.def("_set_allow_tf32(bool allow) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(SEGATTN_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_set_allow_tf32", TORCH_BOX(&segattn::cuda::set_allow_tf32));
}
