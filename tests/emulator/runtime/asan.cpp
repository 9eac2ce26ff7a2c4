// Turns AddressSanitizer's reports into errors of the launch.
#include "memory.h"

#if defined(__SANITIZE_ADDRESS__)

#include <cstdlib>
#include <cstring>
#include <sanitizer/asan_interface.h>
#include <utility>

#include "execution.h"
#include "source_locations.h"

namespace segattn::emulator {
namespace {

std::string report;

// The part of the report that locates the address: "... is located 0 bytes to the right of 512-byte region ...".
std::string region(const char* text) {
  const char* found = std::strstr(text, "is located ");
  if (found == nullptr)
    return "";
  const char* end = std::strpbrk(found, "[\n");
  return ", which " + (end != nullptr ? std::string(found, end) : std::string(found));
}

void remember(const char* text) {
  if (current == nullptr)
    std::abort();  // host code, outside any launch that could report it
  if (!report.empty())
    return;
  report = std::string(__asan_get_report_description()) + ": thread " + std::to_string(self().index) +
      (__asan_get_report_access_type() != 0 ? " writes " : " reads ") +
      std::to_string(__asan_get_report_access_size()) + " bytes at " +
      describe_location(static_cast<char*>(__asan_get_report_pc()) + 1) + region(text);
}

const bool installed = [] {
  __asan_set_error_report_callback(remember);
  return true;
}();

}  // namespace

std::string take_memory_error() {
  return std::exchange(report, {});
}

}  // namespace segattn::emulator

#else

namespace segattn::emulator {
std::string take_memory_error() {
  return {};
}
}  // namespace segattn::emulator

#endif
