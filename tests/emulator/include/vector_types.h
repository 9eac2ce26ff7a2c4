// CUDA's built-in vector types with CUDA's sizes and alignments, for a host compiler.
#pragma once

#include "qualifiers.h"

#define SEGATTN_EMULATOR_VECTOR_TYPES(name, type, align2, align4) \
  struct name##1 {                                                \
    type x;                                                       \
  };                                                              \
  struct alignas(align2) name##2 {                                \
    type x, y;                                                    \
  };                                                              \
  struct name##3 {                                                \
    type x, y, z;                                                 \
  };                                                              \
  struct alignas(align4) name##4 {                                \
    type x, y, z, w;                                              \
  };

SEGATTN_EMULATOR_VECTOR_TYPES(char, signed char, 2, 4)
SEGATTN_EMULATOR_VECTOR_TYPES(uchar, unsigned char, 2, 4)
SEGATTN_EMULATOR_VECTOR_TYPES(short, short, 4, 8)
SEGATTN_EMULATOR_VECTOR_TYPES(ushort, unsigned short, 4, 8)
SEGATTN_EMULATOR_VECTOR_TYPES(int, int, 8, 16)
SEGATTN_EMULATOR_VECTOR_TYPES(uint, unsigned int, 8, 16)
SEGATTN_EMULATOR_VECTOR_TYPES(float, float, 8, 16)
SEGATTN_EMULATOR_VECTOR_TYPES(longlong, long long, 16, 16)
SEGATTN_EMULATOR_VECTOR_TYPES(ulonglong, unsigned long long, 16, 16)
SEGATTN_EMULATOR_VECTOR_TYPES(double, double, 16, 16)

#undef SEGATTN_EMULATOR_VECTOR_TYPES

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
