// A launch's shared memory: the dynamic buffer of each block of a cluster, exactly as large as requested, and the
// library's static arrays, which only clusters of one block can use.
#pragma once

#include <cstddef>
#include <string>

#include "../include/launch_emulated.h"
#include "trace.h"

namespace segattn::emulator {

class SharedMemory {
 public:
  explicit SharedMemory(const LaunchRequest& request);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void* dynamic(int rank) const;
  size_t static_bytes() const { return static_bytes_; }
  const trace::Memory& memory() const { return memory_; }
  void poison();

 private:
  void* dynamic_ = nullptr;
  size_t dynamic_bytes_ = 0;
  int blocks_;
  char* static_ = nullptr;
  size_t static_bytes_ = 0;
  trace::Memory memory_;
};

// AddressSanitizer's first report since the last call, in one line; empty without one and in other builds. Needs
// ASAN_OPTIONS=halt_on_error=0, otherwise AddressSanitizer ends the process.
std::string take_memory_error();

}  // namespace segattn::emulator
