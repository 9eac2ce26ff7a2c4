// Where the operators register. One source serves three libraries: the CPU and CUDA kernels of namespace
// `segattn`, and the emulated CUDA kernels, which register as `segattn_emulated` for CPU tensors (tests/emulator).
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef SEGATTN_NAMESPACE
#define SEGATTN_NAMESPACE segattn
#endif

// The stable macro for a library pastes its argument before expanding it, hence the step in between.
#define SEGATTN_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)

// Usage, in the host file of an op family:
//   SEGATTN_REGISTER_CPU(m) { m.impl("op", TORCH_BOX(&function)); }
#define SEGATTN_REGISTER_CPU(m) STABLE_TORCH_LIBRARY_IMPL(SEGATTN_NAMESPACE, CPU, m)

// The CUDA host code; its emulated build defines SEGATTN_DISPATCH_KEY as CPU.
#ifndef SEGATTN_DISPATCH_KEY
#define SEGATTN_DISPATCH_KEY CUDA
#endif
#define SEGATTN_REGISTER_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(SEGATTN_NAMESPACE, SEGATTN_DISPATCH_KEY, m)
