// Fibers: a stack per CUDA thread, and a switch between them in a dozen instructions (swapcontext makes two system
// calls).
#pragma once

#include <cstddef>

namespace segattn::emulator {

// A suspended thread of control; the rest of its state is on its stack.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxFibers = 8 * 1024;

// The stacks of all fibers are in one reserved range, with guard pages between them; pages are committed on first use.
bool on_fiber_stack(const void* address);

// Prepares the fiber to run `entry` on stack number `index`; entry must not return.
void prepare_fiber(Fiber& fiber, int index, void (*entry)());

// Suspends `from` and continues `to`. With `forever`, `from` is never resumed.
void switch_fiber(Fiber& from, Fiber& to, bool forever = false);

// A fiber's entry calls it first.
void fiber_started();

}  // namespace segattn::emulator
