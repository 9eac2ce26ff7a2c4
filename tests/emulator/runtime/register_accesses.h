// Registers that products of a warpgroup use, in the race build: arrays on the threads' stacks. Finds accesses to
// accumulators and to a's registers between a product and the wait for it, and products without a wgmma.fence after the
// thread's last access to their registers. Accesses that the compiler does not instrument are not seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace segattn::emulator {

class RegisterAccesses {
 public:
  void start_launch();
  void start_block(int threads);

  // The products use `bytes` of registers until finished() with the same address. Empty: no fault, otherwise its
  // description. `again`: by the same accumulators' products, which need no fence between them.
  std::string started(bool written, const void* registers, size_t bytes, int thread, const void* location, bool again);
  void finished(const void* registers, size_t bytes);

  // Any access of the thread to its stack.
  std::string access(bool write, const void* address, size_t bytes, int thread, const void* location);
  void fenced(int thread);

 private:
  struct Word {
    const void* location = nullptr;  // of the latest access, or of the product in flight
    uint32_t fences = 0;             // the thread's when it accessed the word
    uint16_t readers = 0;            // products in flight that read the word, as a register of a
    bool written = false;            // by a product in flight
    bool by_write = false;           // the latest access was a write
  };

  Word* find(const void* address);

  bool active_ = false;  // whether the launch has executed a wgmma.fence
  std::vector<uint32_t> fences_;
  std::unordered_map<uintptr_t, std::vector<Word>> pages_;
  uintptr_t recent_page_ = 0;
  Word* recent_words_ = nullptr;
};

}  // namespace segattn::emulator
