// cp.async. The hardware may write the destination at any time between the copy and the wait. The emulator does both
// extremes: the copy fills the destination with NaN at once, so that reads of the old tile or early reads of the new
// one show, and the data arrive only at the wait.
#include <cstring>

#include "counters.h"
#include "device.h"
#include "execution.h"
#include "trace.h"

namespace segattn::emulator {

void async_copy(void* shared, const void* global, int bytes, int source_bytes, Site site) {
  constexpr const char* kOperation = "cp.async";
  if (device().architecture < 80)
    fail("cp.async (%s) needs sm_80", describe(site).c_str());
  check_shared(kOperation, shared, bytes, site);
  // A copy of zero source bytes reads nothing: ptxas makes the load conditional (seen in the SASS of sm_90).
  if (source_bytes > 0 && reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail("cp.async (%s): the source %p is not aligned to %d bytes", describe(site).c_str(), global, bytes);
  }
  if (source_bytes < 0 || source_bytes > bytes) {
    fail("cp.async (%s): %d source bytes for a copy of %d", describe(site).c_str(), source_bytes, bytes);
  }
  if (!addressable(global, source_bytes)) {
    fail("cp.async (%s): the %d bytes at %p are outside the tensor", describe(site).c_str(), source_bytes, global);
  }
  if constexpr (kTrace) {
    const void* location = location_of(site);
    if (source_bytes > 0)
      trace::access(trace::Access::kAsyncRead, global, source_bytes, location);
    trace::access(trace::Access::kAsyncWrite, shared, bytes, location);
  }
  ++counters.async_copies;
  poison(shared, bytes);
  self().copies.push_back(AsyncCopy{shared, global, bytes, source_bytes, site});
}

void async_commit() {
  self().copy_groups.push_back(self().copies.size());
}

void async_wait(int groups_left) {
  Thread& thread = self();
  if (int(thread.copy_groups.size()) <= groups_left)
    return;
  const size_t landing_groups = thread.copy_groups.size() - groups_left;
  const size_t landing_copies = thread.copy_groups[landing_groups - 1];
  for (size_t i = 0; i < landing_copies; ++i) {
    const AsyncCopy& copy = thread.copies[i];
    std::memcpy(copy.shared, copy.global, copy.source_bytes);
    std::memset(static_cast<char*>(copy.shared) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    if constexpr (kTrace)
      trace::landed(copy.shared, copy.bytes, location_of(copy.site));
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + landing_copies);
  thread.copy_groups.erase(thread.copy_groups.begin(), thread.copy_groups.begin() + landing_groups);
  for (size_t& end : thread.copy_groups)
    end -= landing_copies;
}

}  // namespace segattn::emulator
