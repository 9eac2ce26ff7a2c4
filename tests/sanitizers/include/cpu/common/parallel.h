// Found before csrc/cpu/common/parallel.h in the builds of tests/sanitizers, and includes it. Two of its classes are
// replaced, so that the tools see what the product's own would hide:
//   SerialIfSmall   ThreadSanitizer: does nothing, so that small problems are computed by several threads too.
//   Scratch         otherwise: every take is an allocation of its own, exactly as large as asked for. An access beyond
//                   it would stay inside the product's scratch memory, and a read of what was never written would
//                   find what an earlier unit left.
#ifndef SEGATTN_SANITIZERS_PARALLEL_H
#define SEGATTN_SANITIZERS_PARALLEL_H

#if defined(__SANITIZE_THREAD__)

#define SerialIfSmall SerialIfSmallOfTheProduct
#include_next "cpu/common/parallel.h"
#undef SerialIfSmall

namespace segattn::cpu {

class SerialIfSmall {
 public:
  explicit SerialIfSmall(std::int64_t) {}
};

}  // namespace segattn::cpu

#else

#define Scratch ScratchOfTheProduct
#define parallel_units parallel_units_of_the_product
#include_next "cpu/common/parallel.h"
#undef Scratch
#undef parallel_units

#include <vector>

namespace segattn::cpu {

class Scratch {
 public:
  explicit Scratch(ScratchOfTheProduct& budget) : budget_(budget) {}

  template <class T>
  T* take(std::int64_t count) {
    budget_.take<T>(count);  // throws beyond what the unit has announced
    taken_.push_back(allocate_aligned(static_cast<std::size_t>(count) * sizeof(T)));
    return reinterpret_cast<T*>(taken_.back().get());
  }

 private:
  ScratchOfTheProduct& budget_;
  std::vector<AlignedMemory> taken_;
};

template <class Work>
void parallel_units(std::int64_t units, std::size_t scratch_bytes, const Work& work) {
  parallel_units_of_the_product(units, scratch_bytes, [&](std::int64_t unit, ScratchOfTheProduct& budget) {
    Scratch scratch(budget);
    work(unit, scratch);
  });
}

}  // namespace segattn::cpu

#endif

#endif  // SEGATTN_SANITIZERS_PARALLEL_H
