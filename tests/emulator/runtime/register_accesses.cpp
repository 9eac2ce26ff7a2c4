#include "register_accesses.h"

#include <algorithm>

#include "execution.h"
#include "source_locations.h"

namespace segattn::emulator {
namespace {

constexpr uintptr_t kWordBytes = 4;
constexpr uintptr_t kPageWords = 1024;  // 4 KB of a stack

uintptr_t first_word(const void* address) {
  return reinterpret_cast<uintptr_t>(address) / kWordBytes;
}
uintptr_t last_word(const void* address, size_t bytes) {
  return (reinterpret_cast<uintptr_t>(address) + bytes - 1) / kWordBytes;
}

}  // namespace

void RegisterAccesses::start_launch() {
  active_ = false;
  pages_.clear();
  recent_words_ = nullptr;
}

void RegisterAccesses::start_block(int threads) {
  // What earlier blocks did on the same stacks is older than any fence of this one.
  fences_.resize(std::max(fences_.size(), size_t(threads)));
}

RegisterAccesses::Word* RegisterAccesses::find(const void* address) {
  const uintptr_t word = first_word(address), page = word / kPageWords;
  if (page != recent_page_ || recent_words_ == nullptr) {
    std::vector<Word>& words = pages_[page];
    if (words.empty())
      words.resize(kPageWords);
    recent_page_ = page;
    recent_words_ = words.data();
  }
  return recent_words_ + word % kPageWords;
}

std::string RegisterAccesses::started(
    bool written, const void* registers, size_t bytes, int thread, const void* location, bool again) {
  const char* what = written ? "accumulators" : "registers of a";
  for (size_t i = 0; i < bytes; i += kWordBytes) {
    Word& word = *find(static_cast<const char*>(registers) + i);
    if ((word.written && !again) || (written && word.readers > 0)) {
      return std::string("the ") + what + " of the product at " + describe_location(location) +
          " are those of the product at " + describe_location(word.location) + ", which was not waited for";
    }
    if (!again && word.readers == 0 && word.location != nullptr && word.fences == fences_[size_t(thread)]) {
      return std::string("the product at ") + describe_location(location) +
          " needs a wgmma.fence: " + name_of(thread_at(thread)) + (word.by_write ? " wrote" : " read") + " its " +
          what + " at " + describe_location(word.location);
    }
    word.location = location;
    if (written) {
      word.written = true;
    } else {
      ++word.readers;
    }
  }
  return "";
}

void RegisterAccesses::finished(const void* registers, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kWordBytes) {
    Word& word = *find(static_cast<const char*>(registers) + i);
    if (word.written) {
      word.written = false;
      word.location = nullptr;
    } else if (--word.readers == 0) {
      word.location = nullptr;
    }
  }
}

std::string RegisterAccesses::access(bool write, const void* address, size_t bytes, int thread, const void* location) {
  if (!active_)
    return "";
  for (uintptr_t w = first_word(address); w <= last_word(address, bytes); ++w) {
    Word& word = *find(reinterpret_cast<const void*>(w * kWordBytes));
    if (word.written || word.readers > 0) {
      return name_of(thread_at(thread)) + (write ? " writes" : " reads") + " at " + describe_location(location) +
          (word.written ? " an accumulator" : " a register of a") + " of the product at " +
          describe_location(word.location) + ", which was not waited for";
    }
    word.location = location;
    word.fences = fences_[size_t(thread)];
    word.by_write = write;
  }
  return "";
}

void RegisterAccesses::fenced(int thread) {
  active_ = true;
  ++fences_[size_t(thread)];
}

}  // namespace segattn::emulator
