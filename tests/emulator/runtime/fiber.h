// Fibers: one stack a CUDA thread, and a switch between them in a dozen instructions (swapcontext makes two system calls).
#pragma once

#include <cstddef>

namespace segattn::emulator {

// A suspended flow of control: everything else it needs lies on its stack.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxFibers = 1024;

// The stacks of all fibers lie in one reserved range (pages are committed when first touched), guard pages between.
bool on_fiber_stack(const void* address);

// Makes the fiber ready to run `entry` from its beginning on stack number `index`; entry must never return.
void prepare_fiber(Fiber& fiber, int index, void (*entry)());

// Suspends `from` and continues `to`. With `forever`, `from` is never continued.
void switch_fiber(Fiber& from, Fiber& to, bool forever = false);

// To be called first thing by a fiber's entry.
void fiber_started();

}  // namespace segattn::emulator
