// Registration macros. The CPU and CUDA kernels register in the operator namespace `segattn`. The emulated build of the
// CUDA sources (tests/emulator) defines SEGATTN_NAMESPACE as `segattn_emulated` and SEGATTN_DISPATCH_KEY as CPU.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef SEGATTN_NAMESPACE
#define SEGATTN_NAMESPACE segattn
#endif

// STABLE_TORCH_LIBRARY pastes its argument unexpanded; the indirection expands SEGATTN_NAMESPACE first.
#define SEGATTN_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)

// Usage, in the host file of an op family:
//   SEGATTN_REGISTER_CPU(m) { m.impl("op", TORCH_BOX(&function)); }
#define SEGATTN_REGISTER_CPU(m) STABLE_TORCH_LIBRARY_IMPL(SEGATTN_NAMESPACE, CPU, m)

#ifndef SEGATTN_DISPATCH_KEY
#define SEGATTN_DISPATCH_KEY CUDA
#endif
#define SEGATTN_REGISTER_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(SEGATTN_NAMESPACE, SEGATTN_DISPATCH_KEY, m)
