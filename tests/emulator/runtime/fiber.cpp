#include "fiber.h"

#include <cstdint>
#include <new>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#define SEGATTN_EMULATOR_UCONTEXT
#include <array>
#include <ucontext.h>
#endif

namespace segattn::emulator {
namespace {

constexpr size_t kGuardBytes = 4096 * 16;  // a multiple of every page size in use (aarch64 has 64 KB pages)
constexpr size_t kSlotBytes = kStackBytes + kGuardBytes;

char* stack_arena() {
  static char* const arena = [] {
    void* memory =
        mmap(nullptr, kSlotBytes * kMaxFibers, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
      throw std::bad_alloc();
    return static_cast<char*>(memory);
  }();
  return arena;
}

// The lowest address of stack number `index`, which is made accessible when it is first used.
char* stack_bottom(int index) {
  static int accessible = 0;
  for (; accessible <= index; ++accessible) {
    char* bottom = stack_arena() + accessible * kSlotBytes + kGuardBytes;
    if (mprotect(bottom, kStackBytes, PROT_READ | PROT_WRITE) != 0)
      throw std::bad_alloc();
  }
  return stack_arena() + index * kSlotBytes + kGuardBytes;
}

}  // namespace

#if defined(__x86_64__)
// Saves the callee-saved registers, exchanges the stack pointer, restores. `jmp` instead of `ret`: all fibers resume at
// the same few addresses, which the indirect-branch predictor learns and the return predictor cannot.
extern "C" void segattn_emulator_switch(void** save, void* resume);
asm(R"(
.text
.p2align 4
.globl segattn_emulator_switch
.hidden segattn_emulator_switch
.type segattn_emulator_switch,@function
segattn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size segattn_emulator_switch,.-segattn_emulator_switch
)");

static void* initial_stack(char* top, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(top) - 8;  // 6 registers, the resume address, a null return address
  for (int i = 0; i < 8; ++i)
    frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  return frame;
}
#elif defined(__aarch64__)
extern "C" void segattn_emulator_switch(void** save, void* resume);
asm(R"(
.text
.p2align 4
.globl segattn_emulator_switch
.hidden segattn_emulator_switch
.type segattn_emulator_switch,@function
segattn_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
.size segattn_emulator_switch,.-segattn_emulator_switch
)");

static void* initial_stack(char* top, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(top) - 20;
  for (int i = 0; i < 20; ++i)
    frame[i] = nullptr;
  frame[11] = reinterpret_cast<void*>(entry);  // x30
  return frame;
}
#else
// Portable, several times slower: ucontext.h, with the contexts kept apart from the stacks.
static std::array<ucontext_t, kMaxFibers + 1> contexts;

static void segattn_emulator_switch(void** save, void* resume) {
  if (*save == nullptr)
    *save = &contexts[kMaxFibers];  // the host's own context
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(resume));
}
#endif

bool on_fiber_stack(const void* address) {
  static char* const arena = stack_arena();
  return uintptr_t(address) - uintptr_t(arena) < kSlotBytes * kMaxFibers;
}

void prepare_fiber(Fiber& fiber, int index, void (*entry)()) {
  char* bottom = stack_bottom(index);
  fiber.stack_bottom = bottom;
  fiber.stack_bytes = kStackBytes;
  fiber.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // A fiber abandoned after an error leaves its frames' red zones poisoned.
  __asan_unpoison_memory_region(bottom, kStackBytes);
#endif
#if defined(SEGATTN_EMULATOR_UCONTEXT)
  ucontext_t& context = contexts[index];
  getcontext(&context);
  context.uc_stack.ss_sp = bottom;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  fiber.stack_pointer = &context;
#else
  // Staggered: stacks 256 KB apart would all map to the same few cache sets.
  const size_t stagger = size_t(index % 32) * 192;
  fiber.stack_pointer = initial_stack(bottom + kStackBytes - stagger, entry);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
static Fiber* previous_fiber;
#endif

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool forever) {
#if defined(__SANITIZE_ADDRESS__)
  previous_fiber = &from;
  __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
  segattn_emulator_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, &previous_fiber->stack_bottom, &previous_fiber->stack_bytes);
#endif
}

void fiber_started() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &previous_fiber->stack_bottom, &previous_fiber->stack_bytes);
#endif
}

}  // namespace segattn::emulator
