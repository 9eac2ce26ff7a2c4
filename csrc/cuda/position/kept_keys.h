// The launches of kept_keys.cuh. The numbers of kept keys stay on the device: nothing waits for them, and calls can be
// captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "checks/position.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/launch_context.h"
#include "cuda/common/math.h"
#include "cuda/common/operands.h"
#include "cuda/position/kept_keys.cuh"

namespace segattn::cuda {

// Which keys of each sample take part, and their order.
class KeptKeys {
 public:
  // key_padding_mask: (B, *T), bool, true for padding
  KeptKeys(const LaunchContext& context, const PositionSizes& sizes, const Tensor& key_padding_mask)
      : context_(context),
        keys_(static_cast<int>(sizes.keys)),
        slots_(allocate(key_padding_mask, {sizes.batch, sizes.keys}, ScalarType::Int)),
        counts_(allocate(key_padding_mask, {sizes.batch}, ScalarType::Int)) {
    const Tensor padding = as_contiguous(key_padding_mask);
    const KeySlotsParams params{
        static_cast<const bool*>(padding.const_data_ptr()), static_cast<int*>(slots_.mutable_data_ptr()),
        static_cast<int*>(counts_.mutable_data_ptr()), keys_};
    SEGATTN_LAUNCH(
        (key_slots_kernel<kSlotThreads>), dim3(grid_blocks(sizes.batch)), dim3(kSlotThreads), 0, context.stream,
        params);
  }

  const int* counts() const { return static_cast<const int*>(counts_.const_data_ptr()); }

  // The kept positions of `features`, first in rows that start on 16 bytes.
  FeatureMap gather(const FeatureMap& features) const {
    const Tensor& tensor = features.tensor;
    const int64_t pitch = round_up(features.positions, 16 / element_bytes(context_.dtype));
    const Tensor kept = allocate(tensor, {tensor.size(0), tensor.size(1), pitch}, context_.dtype);
    with_element(context_.dtype, [&]<class T>() {
      launch(gather_kept_kernel<T>, "gather_kept_kernel", features.operand, kept, pitch);
    });
    return {kept, operand_of(kept), features.positions};
  }

  // result (B, rows, *T) from the gradients of the kept keys, (B, rows, M positions); zero for padding.
  void scatter(const Tensor& kept, const Tensor& result) const {
    with_element(result.scalar_type(), [&]<class T>() {
      launch(scatter_kept_kernel<T>, "scatter_kept_kernel", operand_of(result), kept, keys_);
    });
  }

 private:
  void launch(
      void (*kernel)(KeptRowsParams), const char* name, const Operand& all, const Tensor& kept, int64_t pitch) const {
    KeptRowsParams params{};
    params.all = const_cast<void*>(all.data);
    params.kept = const_cast<void*>(kept.const_data_ptr());
    params.slots = static_cast<const int*>(slots_.const_data_ptr());
    params.counts = counts();
    params.all_batch_stride = all.batch_stride;
    params.all_row_stride = all.row_stride;
    params.kept_batch_stride = kept.stride(0);
    params.kept_row_stride = kept.stride(1);
    params.rows = static_cast<int>(kept.size(1));
    params.keys = keys_;
    params.pitch = static_cast<int>(pitch);
    params.column_blocks = ceil_div(params.pitch, kKeptThreads);
    params.row_blocks = ceil_div(params.rows, kKeptRows);
    const int64_t blocks = kept.size(0) * params.column_blocks * params.row_blocks;
    launch_kernel(kernel, name, dim3(grid_blocks(blocks)), dim3(kKeptThreads), 0, context_.stream, params);
  }

  const LaunchContext& context_;
  int keys_;
  Tensor slots_;   // (B, M)
  Tensor counts_;  // (B)
};

}  // namespace segattn::cuda
