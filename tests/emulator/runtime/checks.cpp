// Handlers of -fsanitize=alignment,null,bounds,shift,integer-divide-by-zero. The compiler's own end the process; these
// end the launch and name the source location.
#include <cinttypes>
#include <cstdint>

#include "../include/emulator.h"

namespace segattn::emulator {
namespace {

// Layouts of the data that GCC and Clang pass.
struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};
struct TypeDescriptor {
  uint16_t kind;
  uint16_t info;
  char name[1];
};
struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  uint8_t log2_alignment;
  uint8_t check_kind;
};
struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor* array;
  const TypeDescriptor* index;
};

[[noreturn]] void fail_at(const SourceLocation& location, const char* what) {
  fail("%s at %s:%u:%u", what, location.file, location.line, location.column);
}

}  // namespace
}  // namespace segattn::emulator

using namespace segattn::emulator;

extern "C" {

[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* data, uintptr_t address) {
  const SourceLocation& l = data->location;
  if (address == 0)
    fail("null pointer to %s at %s:%u:%u", data->type->name, l.file, l.line, l.column);
  fail(
      "misaligned access: 0x%" PRIxPTR " is not aligned to the %d bytes of %s, at %s:%u:%u", address,
      1 << data->log2_alignment, data->type->name, l.file, l.line, l.column);
}

[[noreturn]] void __ubsan_handle_out_of_bounds_abort(const OutOfBounds* data, uintptr_t index) {
  const SourceLocation& l = data->location;
  fail("index %" PRIdPTR " is outside %s, at %s:%u:%u", intptr_t(index), data->array->name, l.file, l.line, l.column);
}

[[noreturn]] void __ubsan_handle_shift_out_of_bounds_abort(const SourceLocation* data, uintptr_t, uintptr_t) {
  fail_at(*data, "shift by a negative number or by the type's width or more");
}

[[noreturn]] void __ubsan_handle_divrem_overflow_abort(const SourceLocation* data, uintptr_t, uintptr_t) {
  fail_at(*data, "division by zero");
}

}  // extern "C"
