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
// At least so much lies between the buffers of two blocks.
constexpr size_t kGapBytes = 1024;

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

SharedMemory::SharedMemory(const LaunchRequest& request)
    : dynamic_bytes_(request.dynamic_shared_bytes), blocks_(int(request.cluster_size)) {
  const size_t stride = (dynamic_bytes_ + kDynamicAlignment - 1) / kDynamicAlignment * kDynamicAlignment + kGapBytes;
  if (dynamic_bytes_ > 0) {
    const size_t bytes = size_t(blocks_ - 1) * stride + dynamic_bytes_;
    if (posix_memalign(&dynamic_, kDynamicAlignment, bytes) != 0)
      throw std::bad_alloc();
  }
  const Segment segment = static_shared_segment(request.kernel);
  static_ = segment.data;
  static_bytes_ = segment.bytes;
  memory_.dynamic_shared = static_cast<const char*>(dynamic_);
  memory_.dynamic_bytes = dynamic_bytes_;
  memory_.dynamic_stride = stride;
  memory_.blocks = blocks_;
  memory_.static_shared = static_;
  memory_.static_bytes = static_bytes_;
  memory_.arguments = static_cast<const char*>(request.arguments);
  memory_.argument_bytes = request.argument_bytes;
  memory_.kernel = request.kernel;
#if defined(__SANITIZE_ADDRESS__)
  for (int rank = 0; rank + 1 < blocks_ && dynamic_bytes_ > 0; ++rank) {
    char* end = static_cast<char*>(dynamic(rank)) + dynamic_bytes_;
    __asan_poison_memory_region(end, size_t(static_cast<char*>(dynamic(rank + 1)) - end));
  }
#endif
  active = this;
}

SharedMemory::~SharedMemory() {
  active = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  if (dynamic_ != nullptr)
    __asan_unpoison_memory_region(dynamic_, size_t(blocks_ - 1) * memory_.dynamic_stride + dynamic_bytes_);
#endif
  std::free(dynamic_);
}

void* SharedMemory::dynamic(int rank) const {
  return dynamic_ != nullptr ? static_cast<char*>(dynamic_) + size_t(rank) * memory_.dynamic_stride : nullptr;
}

void SharedMemory::poison() {
  for (int rank = 0; rank < blocks_ && dynamic_bytes_ > 0; ++rank)
    emulator::poison(dynamic(rank), dynamic_bytes_);
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
  check_in_shared(operation, address, size_t(bytes), site);
}

void check_in_shared(const char* operation, const void* address, size_t bytes, const Site& site) {
  const trace::Memory& memory = active->memory();
  const char* dynamic = static_cast<const char*>(self().block->dynamic_shared);
  if (inside(address, bytes, dynamic, memory.dynamic_bytes))
    return;
  if (inside(address, bytes, memory.static_shared, memory.static_bytes)) {
    if (memory.blocks > 1) {
      fail(
          "%s (%s): static shared memory in a cluster, whose blocks would share it in the emulator", operation,
          describe(site).c_str());
    }
    return;
  }
  fail(
      "%s (%s): %zu bytes at offset %td are outside the %zu bytes of shared memory", operation, describe(site).c_str(),
      bytes, static_cast<const char*>(address) - dynamic, memory.dynamic_bytes);
}

std::string name_of_shared(size_t byte) {
  const trace::Memory& memory = active->memory();
  if (memory.blocks == 1)
    return "shared memory, byte " + std::to_string(byte);
  const Block& block = block_at(int(byte / memory.dynamic_stride));
  return "shared memory of " + name_of(block) + ", byte " + std::to_string(byte % memory.dynamic_stride);
}

bool addressable([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  return bytes == 0 || __asan_region_is_poisoned(const_cast<void*>(address), bytes) == nullptr;
#else
  return true;
#endif
}

}  // namespace segattn::emulator
