// Replaces the allocation functions of a process (LD_PRELOAD), so that a chosen one fails.
// tests/ops/failing_allocations.py drives it.
//
//   segattn_watch(name)     Counts the allocations that the code of the library, whose file name contains `name`, makes
//                           with operator new, and with them those of tensors, which torch makes with posix_memalign.
//                           With an empty name: those of all libraries, made by the thread that calls segattn_arm.
//   segattn_arm(n, last)    From here on the counted allocations from the n-th, counted from 0, to the last one fail.
//   segattn_disarm()        Returns how many were counted.
//   segattn_stack(offsets)  The library's frames above the first one that failed, the innermost first, as offsets; the
//                           array has room for 64.
//   segattn_places(...)     The places in the library that made a counted allocation, as offsets; returns their number.
//   segattn_fail_threads(fails)
//                           Whether pthread_create fails from here on.
//   segattn_live()          Blocks allocated by operator new or posix_memalign while armed, by any code, and not yet
//                           freed.
//
// Allocations that are not counted succeed.
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <execinfo.h>
#include <limits>
#include <link.h>
#include <mutex>
#include <new>
#include <pthread.h>
#include <set>
#include <unordered_set>

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void __libc_free(void*);
}

namespace {

// The containers below must not call what this file replaces.
template <class T>
struct Untracked {
  using value_type = T;
  Untracked() = default;
  template <class U>
  Untracked(const Untracked<U>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(__libc_malloc(count * sizeof(T))); }
  void deallocate(T* memory, std::size_t) { __libc_free(memory); }
  bool operator==(const Untracked&) const { return true; }
};

constexpr int kMostFrames = 64;

struct State {
  std::recursive_mutex mutex;                   // backtrace() may free memory
  std::uintptr_t code_begin = 0, code_end = 0;  // of the watched library; both 0: every library counts
  std::uintptr_t base = 0;
  pthread_t thread{};  // that armed
  std::int64_t stack[kMostFrames];
  std::int64_t stack_size = 0;
  std::int64_t counted = 0, first_failing = 0, last_failing = 0;
  std::set<std::uintptr_t, std::less<>, Untracked<std::uintptr_t>> places;
  std::unordered_set<void*, std::hash<void*>, std::equal_to<>, Untracked<void*>> live;
};

// Not destroyed: the process allocates until its end.
State& state() {
  alignas(State) static std::byte memory[sizeof(State)];
  static State* const made = new (memory) State;
  return *made;
}

std::atomic<bool> armed{false};
std::atomic<bool> threads_fail{false};
std::atomic<bool> tracks{false};  // some blocks may be live

enum class Function { kNew, kTensor };

// The calls of the library that lead to the allocation, the innermost first.
void remember_stack() {
  State& s = state();
  void* frames[kMostFrames];
  const int count = backtrace(frames, kMostFrames);
  s.stack_size = 0;
  for (int i = 0; i < count; ++i) {
    const auto address = reinterpret_cast<std::uintptr_t>(frames[i]);
    if (address >= s.code_begin && address < s.code_end) {
      s.stack[s.stack_size++] = static_cast<std::int64_t>(address - s.base);
    }
  }
}

bool fails(Function function, std::uintptr_t caller) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  const bool in_library = caller >= s.code_begin && caller < s.code_end;
  const bool counts =
      s.code_end == 0 ? pthread_equal(s.thread, pthread_self()) != 0 : in_library || function == Function::kTensor;
  if (!counts) {
    return false;
  }
  if (in_library) {
    s.places.insert(caller - s.base);
  }
  const std::int64_t number = s.counted++;
  const bool result = number >= s.first_failing && number <= s.last_failing;
  if (result && number == s.first_failing) {
    remember_stack();
  }
  return result;
}

void remember(void* memory) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.live.insert(memory);
  tracks = true;
}

// Null where the allocation is to fail.
void* allocate(std::size_t bytes, std::size_t alignment, Function function, void* return_address) {
  const auto caller = reinterpret_cast<std::uintptr_t>(return_address);
  if (!armed.load(std::memory_order_relaxed)) {
    return alignment == 0 ? __libc_malloc(bytes) : __libc_memalign(alignment, bytes);
  }
  if (fails(function, caller)) {
    return nullptr;
  }
  void* const memory = alignment == 0 ? __libc_malloc(bytes) : __libc_memalign(alignment, bytes);
  if (memory != nullptr) {
    remember(memory);
  }
  return memory;
}

void* allocate_or_throw(std::size_t bytes, std::size_t alignment, void* return_address) {
  void* const memory = allocate(bytes == 0 ? 1 : bytes, alignment, Function::kNew, return_address);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

int find_code(dl_phdr_info* info, std::size_t, void* name) {
  if (std::strstr(info->dlpi_name, static_cast<const char*>(name)) == nullptr) {
    return 0;
  }
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& segment = info->dlpi_phdr[i];
    if (segment.p_type == PT_LOAD && (segment.p_flags & PF_X) != 0) {
      State& s = state();
      s.base = info->dlpi_addr;
      s.code_begin = info->dlpi_addr + segment.p_vaddr;
      s.code_end = s.code_begin + segment.p_memsz;
      return 1;
    }
  }
  return 0;
}

}  // namespace

#define RETURN_ADDRESS __builtin_extract_return_addr(__builtin_return_address(0))

void* operator new(std::size_t bytes) {
  return allocate_or_throw(bytes, 0, RETURN_ADDRESS);
}
void* operator new[](std::size_t bytes) {
  return allocate_or_throw(bytes, 0, RETURN_ADDRESS);
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<std::size_t>(alignment), RETURN_ADDRESS);
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<std::size_t>(alignment), RETURN_ADDRESS);
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes == 0 ? 1 : bytes, 0, Function::kNew, RETURN_ADDRESS);
}
void* operator new(std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return allocate(bytes == 0 ? 1 : bytes, static_cast<std::size_t>(alignment), Function::kNew, RETURN_ADDRESS);
}
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes == 0 ? 1 : bytes, 0, Function::kNew, RETURN_ADDRESS);
}

extern "C" {

int posix_memalign(void** memory, std::size_t alignment, std::size_t bytes) {
  void* const found = allocate(bytes, alignment, Function::kTensor, RETURN_ADDRESS);
  if (found == nullptr) {
    return ENOMEM;
  }
  *memory = found;
  return 0;
}

// The standard library's operator delete calls it.
void free(void* memory) {
  if (memory != nullptr && tracks.load(std::memory_order_relaxed)) {
    State& s = state();
    const std::lock_guard lock(s.mutex);
    s.live.erase(memory);
  }
  __libc_free(memory);
}

int segattn_watch(const char* name) {
  State& s = state();
  s.code_begin = s.code_end = 0;
  s.places.clear();
  return *name == 0 ? 1 : dl_iterate_phdr(&find_code, const_cast<char*>(name));
}

void segattn_arm(std::int64_t first_failing, std::int64_t last_failing) {
  State& s = state();
  s.thread = pthread_self();
  s.counted = 0;
  s.stack_size = 0;
  s.first_failing = first_failing;
  s.last_failing = last_failing;
  armed = true;
}

std::int64_t segattn_disarm() {
  armed = false;
  return state().counted;
}

std::int64_t segattn_stack(std::int64_t* offsets) {
  const State& s = state();
  std::memcpy(offsets, s.stack, sizeof(s.stack));
  return s.stack_size;
}

std::int64_t segattn_places(std::int64_t* offsets, std::int64_t room) {
  std::int64_t count = 0;
  for (const std::uintptr_t place : state().places) {
    if (count < room) {
      offsets[count] = static_cast<std::int64_t>(place);
    }
    ++count;
  }
  return count;
}

std::int64_t segattn_live() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  return static_cast<std::int64_t>(s.live.size());
}

void segattn_fail_threads(int fails) {
  threads_fail = fails != 0;
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* argument) {
  static const auto create = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  return threads_fail ? EAGAIN : create(thread, attributes, run, argument);
}

}  // extern "C"
