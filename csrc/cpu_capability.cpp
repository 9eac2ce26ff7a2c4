// The best CPU library for this processor: 0 baseline, 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16 dot products. A plain C
// function, because segattn_ops/_library.py calls it before it loads a kernel library.

extern "C" __attribute__((visibility("default"))) int segattn_cpu_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return 0;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return 1;
  }
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}
