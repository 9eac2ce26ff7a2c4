// The thread pool of the ThreadSanitizer build. Torch's is OpenMP's, whose synchronization ThreadSanitizer does not
// see, so that every result of a parallel loop would count as a race. The linker (--wrap) directs the library's two
// calls here: each loop starts threads of its own and joins them.
#include <cstdint>
#include <latch>
#include <thread>
#include <vector>

namespace {

constexpr std::uint32_t kThreads = 4;

}  // namespace

using ParallelFunction = void (*)(std::int64_t begin, std::int64_t end, void* context);

extern "C" std::int32_t __wrap_torch_get_num_threads(std::uint32_t* threads) {
  *threads = kThreads;
  return 0;
}

// One iteration for each thread, as parallel_units asks for; the caller's thread takes the first. All wait for the last
// to start: otherwise the first would often do all the work.
extern "C" std::int32_t __wrap_torch_parallel_for(
    std::int64_t begin, std::int64_t end, std::int64_t, ParallelFunction function, void* context) {
  std::latch started(end - begin);
  const auto run = [&](std::int64_t i) {
    started.arrive_and_wait();
    function(i, i + 1, context);
  };
  std::vector<std::thread> threads;
  for (std::int64_t i = begin + 1; i < end; ++i) {
    threads.emplace_back(run, i);
  }
  run(begin);
  for (std::thread& thread : threads) {
    thread.join();
  }
  return 0;
}
