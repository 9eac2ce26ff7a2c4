#include "source_locations.h"

#include <bit>
#include <cstdint>
#include <cstdio>
#include <dlfcn.h>
#include <link.h>
#include <mutex>
#include <unordered_map>

#include "execution.h"

namespace segattn::emulator {
namespace {

struct LoadedSegment {
  uintptr_t address;
  Image image;
  bool executable = false;
};

LoadedSegment find_segment(const void* address) {
  LoadedSegment found{uintptr_t(address), {}, false};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* argument) {
        auto& f = *static_cast<LoadedSegment*>(argument);
        uintptr_t begin = UINTPTR_MAX, end = 0;
        bool holds = false, executable = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr)& header = info->dlpi_phdr[i];
          if (header.p_type != PT_LOAD)
            continue;
          const uintptr_t first = info->dlpi_addr + header.p_vaddr;
          begin = std::min(begin, first);
          end = std::max(end, first + header.p_memsz);
          if (f.address - first < header.p_memsz) {
            holds = true;
            executable = (header.p_flags & PF_X) != 0;
          }
        }
        if (!holds)
          return 0;
        f.image = {reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(end)};
        f.executable = executable;
        return 1;
      },
      &found);
  return found;
}

// The "/path/file.cuh:12" of addr2line, shortened to "file.cuh:12".
std::string look_up(const void* return_address) {
  Dl_info info{};
  if (dladdr(return_address, &info) == 0)
    return "an unknown location";
  const size_t offset = uintptr_t(return_address) - uintptr_t(info.dli_fbase) - 1;
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  std::string line;
  if (FILE* pipe = popen(command, "r"); pipe != nullptr) {
    char text[4096];
    if (std::fgets(text, sizeof text, pipe) != nullptr)
      line = text;
    pclose(pipe);
  }
  line = line.substr(0, line.find_first_of(" \n"));
  if (line.empty() || line[0] == '?') {
    char text[64];
    std::snprintf(text, sizeof text, "+0x%zx", offset);
    return info.dli_fname + std::string(text);
  }
  return line.substr(line.rfind('/') + 1);
}

}  // namespace

Image image_of(const void* address) {
  return find_segment(address).image;
}

std::string describe_location(const void* location) {
  static std::mutex mutex;
  static std::unordered_map<const void*, std::string> known;
  const std::lock_guard lock(mutex);
  std::string& name = known[location];
  if (name.empty())
    name = find_segment(location).executable ? look_up(location) : describe(std::bit_cast<Site>(location));
  return name;
}

}  // namespace segattn::emulator
