// Source locations of device code, and the libraries that hold an address.
#pragma once

#include <string>

namespace segattn::emulator {

// "file.cuh:120" for a return address (found by addr2line, which is slow) or for a Site (location_of).
std::string describe_location(const void* location);

// The address range of a loaded library, code and data.
struct Image {
  const char* begin = nullptr;
  const char* end = nullptr;
  bool contains(const void* address) const { return address >= begin && address < end; }
};
// The image of the library that contains `address`.
Image image_of(const void* address);

}  // namespace segattn::emulator
