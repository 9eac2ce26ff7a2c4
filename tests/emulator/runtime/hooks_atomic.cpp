// Atomic operations of host code compiled with -fsanitize=thread (guards of static variables, shared pointers),
// executed without any tracking.
#if defined(SEGATTN_EMULATOR_TRACE)

#include <cstdint>

#define SEGATTN_EMULATOR_ATOMIC_FETCH(bits, type, name, operation)             \
  type __tsan_atomic##bits##_##name(volatile type* address, type value, int) { \
    return operation(address, value, __ATOMIC_SEQ_CST);                        \
  }
#define SEGATTN_EMULATOR_ATOMIC_COMPARE(bits, type, name, weak)                                             \
  int __tsan_atomic##bits##_##name(volatile type* address, type* expected, type value, int, int) {          \
    return __atomic_compare_exchange_n(address, expected, value, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
#define SEGATTN_EMULATOR_ATOMICS(bits, type)                                                                     \
  type __tsan_atomic##bits##_load(const volatile type* address, int) {                                           \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                              \
  void __tsan_atomic##bits##_store(volatile type* address, type value, int) {                                    \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                              \
  type __tsan_atomic##bits##_compare_exchange_val(volatile type* address, type expected, type value, int, int) { \
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);           \
    return expected;                                                                                             \
  }                                                                                                              \
  SEGATTN_EMULATOR_ATOMIC_COMPARE(bits, type, compare_exchange_strong, false)                                    \
  SEGATTN_EMULATOR_ATOMIC_COMPARE(bits, type, compare_exchange_weak, true)                                       \
  SEGATTN_EMULATOR_ATOMIC_FETCH(bits, type, exchange, __atomic_exchange_n)                                       \
  SEGATTN_EMULATOR_ATOMIC_FETCH(bits, type, fetch_add, __atomic_fetch_add)                                       \
  SEGATTN_EMULATOR_ATOMIC_FETCH(bits, type, fetch_sub, __atomic_fetch_sub)                                       \
  SEGATTN_EMULATOR_ATOMIC_FETCH(bits, type, fetch_and, __atomic_fetch_and)                                       \
  SEGATTN_EMULATOR_ATOMIC_FETCH(bits, type, fetch_or, __atomic_fetch_or)                                         \
  SEGATTN_EMULATOR_ATOMIC_FETCH(bits, type, fetch_xor, __atomic_fetch_xor)                                       \
  SEGATTN_EMULATOR_ATOMIC_FETCH(bits, type, fetch_nand, __atomic_fetch_nand)

extern "C" {
SEGATTN_EMULATOR_ATOMICS(8, uint8_t)
SEGATTN_EMULATOR_ATOMICS(16, uint16_t)
SEGATTN_EMULATOR_ATOMICS(32, uint32_t)
SEGATTN_EMULATOR_ATOMICS(64, uint64_t)
void __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
void __tsan_atomic_signal_fence(int) {
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
}
}

#endif  // SEGATTN_EMULATOR_TRACE
