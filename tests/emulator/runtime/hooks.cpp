// The functions that code compiled with -fsanitize=thread calls at its memory accesses. They feed the race detector and
// the counters instead of ThreadSanitizer.
#include "trace.h"

#if defined(SEGATTN_EMULATOR_TRACE)

#include "../include/emulator.h"
#include "source_locations.h"

namespace segattn::emulator {
namespace {

using trace::Access;

inline void on_access(Access kind, const void* address, size_t bytes, bool aligned, const void* location) {
  if (current == nullptr)
    return;
  if (aligned && reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail(
        "misaligned access: %p is not aligned to the %zu bytes of a %s at %s", address, bytes,
        kind == Access::kRead ? "read" : "write", describe_location(location).c_str());
  }
  trace::access(kind, address, bytes, location);
}

}  // namespace
}  // namespace segattn::emulator

using namespace segattn::emulator;

#define SEGATTN_EMULATOR_HOOKS(bytes)                                        \
  void __tsan_read##bytes(void* p) {                                         \
    on_access(Access::kRead, p, bytes, true, __builtin_return_address(0));   \
  }                                                                          \
  void __tsan_write##bytes(void* p) {                                        \
    on_access(Access::kWrite, p, bytes, true, __builtin_return_address(0));  \
  }                                                                          \
  void __tsan_unaligned_read##bytes(void* p) {                               \
    on_access(Access::kRead, p, bytes, false, __builtin_return_address(0));  \
  }                                                                          \
  void __tsan_unaligned_write##bytes(void* p) {                              \
    on_access(Access::kWrite, p, bytes, false, __builtin_return_address(0)); \
  }

extern "C" {
SEGATTN_EMULATOR_HOOKS(1)
SEGATTN_EMULATOR_HOOKS(2)
SEGATTN_EMULATOR_HOOKS(4)
SEGATTN_EMULATOR_HOOKS(8)
SEGATTN_EMULATOR_HOOKS(16)

void __tsan_read_range(void* p, size_t bytes) {
  if (bytes > 0)
    on_access(Access::kRead, p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  if (bytes > 0)
    on_access(Access::kWrite, p, bytes, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

#endif  // SEGATTN_EMULATOR_TRACE
