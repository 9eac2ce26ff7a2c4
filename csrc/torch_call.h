// Calls of torch's C interface.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

// Throws std::runtime_error naming the call if it fails. The headers of torch 2.10 and 2.11 lack the macro that adds
// torch's own message, such as that of a failed allocation.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define SEGATTN_CHECK_TORCH(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define SEGATTN_CHECK_TORCH(call) TORCH_ERROR_CODE_CHECK(call)
#endif
