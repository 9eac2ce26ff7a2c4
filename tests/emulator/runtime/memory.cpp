#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "execution.h"

extern "C" void* __tls_get_addr(void* index);

namespace segattn::emulator {
namespace {

const SharedMemory* active = nullptr;

// A multiple of the 128 bytes of all 32 banks, so that addresses determine banks.
constexpr size_t kDynamicAlignment = 1024;

struct Segment {
  const void* code;
  char* data = nullptr;
  size_t bytes = 0;
};

// Static shared arrays are the thread-local storage of the library that holds `code` (include/qualifiers.h).
Segment static_shared_segment(const void* code) {
  Segment segment{code};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* argument) {
        auto& found = *static_cast<Segment*>(argument);
        const ElfW(Phdr)* storage = nullptr;
        bool holds = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr)& header = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD && uintptr_t(found.code) - begin < header.p_memsz)
            holds = true;
          if (header.p_type == PT_TLS)
            storage = &header;
        }
        if (!holds)
          return 0;
        if (storage != nullptr && storage->p_memsz > 0) {
          unsigned long index[2] = {info->dlpi_tls_modid, 0};
          found.data = static_cast<char*>(__tls_get_addr(index));
          found.bytes = storage->p_memsz;
        }
        return 1;
      },
      &segment);
  return segment;
}

bool inside(const void* address, size_t bytes, const void* begin, size_t size) {
  const uintptr_t offset = uintptr_t(address) - uintptr_t(begin);
  return offset <= size && bytes <= size - offset;
}

}  // namespace

SharedMemory::SharedMemory(const LaunchRequest& request) : dynamic_bytes_(request.dynamic_shared_bytes) {
  if (dynamic_bytes_ > 0 && posix_memalign(&dynamic_, kDynamicAlignment, dynamic_bytes_) != 0)
    throw std::bad_alloc();
  const Segment segment = static_shared_segment(request.kernel);
  static_ = segment.data;
  static_bytes_ = segment.bytes;
  memory_ =
      trace::Memory{static_cast<const char*>(dynamic_),          dynamic_bytes_,         static_,       static_bytes_,
                    static_cast<const char*>(request.arguments), request.argument_bytes, request.kernel};
  active = this;
}

SharedMemory::~SharedMemory() {
  active = nullptr;
  std::free(dynamic_);
}

void SharedMemory::poison() {
  if (dynamic_bytes_ > 0)
    emulator::poison(dynamic_, dynamic_bytes_);
  if (static_bytes_ > 0)
    emulator::poison(static_, static_bytes_);
}

void poison(void* memory, size_t bytes) {
  std::memset(memory, 0xff, bytes);
}

void check_shared(const char* operation, const void* address, int bytes, const Site& site) {
  if (uintptr_t(address) % bytes != 0) {
    fail("%s (%s): shared address %p is not aligned to %d bytes", operation, describe(site).c_str(), address, bytes);
  }
  const trace::Memory& memory = active->memory();
  if (inside(address, bytes, memory.dynamic_shared, memory.dynamic_bytes) ||
      inside(address, bytes, memory.static_shared, memory.static_bytes)) {
    return;
  }
  fail(
      "%s (%s): %d bytes at offset %td are outside the %zu bytes of shared memory", operation, describe(site).c_str(),
      bytes, static_cast<const char*>(address) - memory.dynamic_shared, memory.dynamic_bytes);
}

bool addressable([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  return bytes == 0 || __asan_region_is_poisoned(const_cast<void*>(address), bytes) == nullptr;
#else
  return true;
#endif
}

}  // namespace segattn::emulator
