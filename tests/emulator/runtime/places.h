// Names for places in the code.
#pragma once

#include <string>

namespace segattn::emulator {

// "file.cuh:120" for a return address (looked up by addr2line, slow) or for a Site (place_of).
std::string describe_place(const void* place);

// The range of addresses a loaded library takes, code and data; that of the library that holds `address`.
struct Image {
  const char* begin = nullptr;
  const char* end = nullptr;
  bool contains(const void* address) const { return address >= begin && address < end; }
};
Image image_of(const void* address);

}  // namespace segattn::emulator
