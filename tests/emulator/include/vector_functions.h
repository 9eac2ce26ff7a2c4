// make_float4 and its relatives.
#pragma once

#include "vector_types.h"

#define SEGATTN_EMULATOR_MAKE_VECTOR(name, type)                     \
  constexpr name##1 make_##name##1(type x) {                         \
    return {x};                                                      \
  }                                                                  \
  constexpr name##2 make_##name##2(type x, type y) {                 \
    return {x, y};                                                   \
  }                                                                  \
  constexpr name##3 make_##name##3(type x, type y, type z) {         \
    return {x, y, z};                                                \
  }                                                                  \
  constexpr name##4 make_##name##4(type x, type y, type z, type w) { \
    return {x, y, z, w};                                             \
  }

SEGATTN_EMULATOR_MAKE_VECTOR(char, signed char)
SEGATTN_EMULATOR_MAKE_VECTOR(uchar, unsigned char)
SEGATTN_EMULATOR_MAKE_VECTOR(short, short)
SEGATTN_EMULATOR_MAKE_VECTOR(ushort, unsigned short)
SEGATTN_EMULATOR_MAKE_VECTOR(int, int)
SEGATTN_EMULATOR_MAKE_VECTOR(uint, unsigned int)
SEGATTN_EMULATOR_MAKE_VECTOR(float, float)
SEGATTN_EMULATOR_MAKE_VECTOR(longlong, long long)
SEGATTN_EMULATOR_MAKE_VECTOR(ulonglong, unsigned long long)
SEGATTN_EMULATOR_MAKE_VECTOR(double, double)

#undef SEGATTN_EMULATOR_MAKE_VECTOR
