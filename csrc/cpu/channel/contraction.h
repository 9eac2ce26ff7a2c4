// Channel attention: products of channels, contracted over positions: result(m, n) = sum_p left(m, p) right(n, p).
//
// The positions are cut into splits, each summed into its own matrix; load_rows adds the splits in order. The cut
// depends on the sizes alone, so the sums do not depend on the number of threads.
//
// A unit computes a block of columns (rows of `right`) of one split, kPositionBlock positions at a time: it packs
// `right`, which transposes, and multiplies. In a symmetric product (Left::data is null: left = right) the packed
// panels are the A operand too, so nothing is packed twice, and only the blocks on and above the diagonal are computed;
// load_rows mirrors them.
#pragma once

#include <span>

#include "cpu/common/pack.h"
#include "cpu/common/parallel.h"
#include "cpu/common/range.h"

namespace segattn::cpu {

// The cut and the storage of one contraction.
template <class P>
struct ContractionPlan {
  static constexpr std::int64_t kPanel = panel_columns<P>;

  std::int64_t rows, columns, positions;
  std::int64_t splits, column_blocks;

  // Many positions: wide blocks, which use each packed element in more products, and several splits. Few positions:
  // narrow blocks, as adding up the splits would cost more than computing them.
  ContractionPlan(std::int64_t rows_, std::int64_t columns_, std::int64_t positions_)
      : rows(rows_), columns(columns_), positions(positions_) {
    constexpr std::int64_t kUnits = 8;
    const std::int64_t widest = positions >= 2048 ? 528 : 144;
    column_blocks = std::clamp<std::int64_t>(ceil_div(columns, widest), 1, panels());
    splits = std::clamp<std::int64_t>(ceil_div(kUnits, column_blocks), 1, std::max<std::int64_t>(1, positions / 1024));
  }

  std::int64_t leading_dimension() const { return padded_columns<P>(columns); }
  std::int64_t split_size() const { return rows * leading_dimension(); }
  std::int64_t size() const { return splits * split_size(); }
  std::int64_t units() const { return splits * column_blocks; }

  Range positions_of(std::int64_t split) const { return part_of(positions, 1, split, splits); }
  // Whole panels.
  Range columns_of(std::int64_t block) const { return part_of(columns, kPanel, block, column_blocks); }
  std::int64_t widest_block() const { return ceil_div(panels(), column_blocks) * kPanel; }

 private:
  std::int64_t panels() const { return ceil_div(columns, kPanel); }
};

// Whether a matrix is stored completely or, being symmetric, only on and above the diagonal.
enum class Storage { kFull, kUpper };

// Computes one contraction, or several with the same `right`, which is then packed once.
template <class T>
class ChannelContraction {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  static constexpr std::int64_t kPanel = panel_columns<P>;

  // A panel of B (48 columns of float) takes 24 KB, half of a 48 KB L1; the other half is for A.
  static constexpr std::int64_t kPositionBlock = kIsPair<P> ? 256 : 128;

 public:
  struct Left {
    const T* data;  // (m, positions); null: right
    A* result;      // [splits][m][leading dimension]
  };

  // right: (n, positions). Every `left` has plan.rows rows.
  ChannelContraction(const ContractionPlan<P>& plan, const T* right, std::span<const Left> left)
      : plan_(plan), right_(right), left_(left) {}

  static std::size_t scratch(const ContractionPlan<P>& plan) {
    const std::int64_t widest = std::max(plan.widest_block(), round_up(plan.columns, kPanel));
    return scratch_bytes<P>(packed_b_size<P>(widest, kPositionBlock)) +
        scratch_bytes<P>(packed_a_size<P>(plan.rows, kPositionBlock));
  }

  void run_unit(std::int64_t unit, Scratch& scratch) const {
    const std::int64_t split = unit % plan_.splits;
    // Largest units first: the last blocks of a symmetric product have the most rows.
    const std::int64_t block = plan_.column_blocks - 1 - unit / plan_.splits;
    const Range positions = plan_.positions_of(split);
    const Range columns = plan_.columns_of(block);
    bool symmetric = false;
    for (const Left& left : left_) {
      symmetric |= left.data == nullptr;
    }
    // The A operand of a symmetric product includes the columns left of the block.
    const Range packed_columns{symmetric ? 0 : columns.begin, columns.end};
    if (plan_.positions == 0) {
      fill_zero(columns);
      return;
    }
    P* const packed_right = scratch.take<P>(packed_b_size<P>(packed_columns.size(), kPositionBlock));
    P* const packed_left = scratch.take<P>(packed_a_size<P>(plan_.rows, kPositionBlock));
    for (std::int64_t position = positions.begin; position < positions.end; position += kPositionBlock) {
      const std::int64_t count = std::min(kPositionBlock, positions.end - position);
      const GemmMode mode = position == positions.begin ? GemmMode::kStore : GemmMode::kAdd;
      pack_b_from_columns<P>(
          packed_right, right_ + packed_columns.begin * plan_.positions + position, plan_.positions,
          packed_columns.size(), count);
      for (const Left& left : left_) {
        A* const result = left.result + split * plan_.split_size();
        if (left.data == nullptr) {
          multiply_symmetric(packed_right, columns, k_steps<P>(count), mode, result);
        } else {
          pack_a_from_rows<P>(packed_left, left.data + position, plan_.positions, plan_.rows, count);
          tile_gemm<P>(
              AOperand<P>::packed(packed_left),
              packed_right + (columns.begin - packed_columns.begin) * k_steps<P>(count),
              COperand<A>::row_major(result + columns.begin, plan_.leading_dimension()), plan_.rows, columns.size(),
              k_steps<P>(count), mode);
        }
      }
    }
  }

 private:
  // The blocks of `block`'s columns on and above the diagonal. A panel of packed columns, read with swapped strides, is
  // the A operand of the same rows.
  void multiply_symmetric(const P* packed, Range block, std::int64_t steps, GemmMode mode, A* result) const {
    for (std::int64_t column = block.begin; column < block.end; column += kPanel) {
      const std::int64_t columns = std::min(kPanel, block.end - column);
      for (std::int64_t row = 0; row <= column; row += kPanel) {
        const std::int64_t rows = std::min(kPanel, plan_.rows - row);
        const std::int64_t row_width = panel_width<P>(block.end, row);
        tile_gemm<P>(
            AOperand<P>::strided(packed + row * steps, row_width, 1), packed + column * steps,
            COperand<A>::row_major(result + row * plan_.leading_dimension() + column, plan_.leading_dimension()), rows,
            columns, steps, mode);
      }
    }
  }

  void fill_zero(Range columns) const {
    for (const Left& left : left_) {
      for (std::int64_t row = 0; row < plan_.rows; ++row) {
        std::fill_n(
            left.result + row * plan_.leading_dimension() + columns.begin, padded_columns<P>(columns.size()), A(0));
      }
    }
  }

  const ContractionPlan<P>& plan_;
  const T* right_;
  std::span<const Left> left_;
};

// target [rows][leading dimension] = rows [row, row + rows) of the result, splits added in order. `row` starts a panel,
// and `rows` is at most a panel.
template <class P, class A>
void load_rows(
    const ContractionPlan<P>& plan, const A* result, Storage storage, std::int64_t row, std::int64_t rows, A* target) {
  constexpr std::int64_t lanes = kLanes<A>;
  constexpr std::int64_t panel = panel_columns<P>;
  using V = Vec<A>;
  const std::int64_t ld = plan.leading_dimension();
  const auto add_splits = [&](std::int64_t r, std::int64_t column) {
    const A* source = result + r * ld + column;
    V sum = load<V>(source);
    for (std::int64_t split = 1; split < plan.splits; ++split) {
      sum += load<V>(source + split * plan.split_size());
    }
    return sum;
  };
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t column = storage == Storage::kUpper ? row : 0; column < ld; column += lanes) {
      store(target + r * ld + column, add_splits(row + r, column));
    }
  }
  if (storage == Storage::kFull) {
    return;
  }
  A block[panel * panel];
  for (std::int64_t column = 0; column < row; column += panel) {  // the mirror of rows column.., columns row..
    for (std::int64_t r = 0; r < panel; ++r) {
      for (std::int64_t i = 0; i < padded_columns<P>(rows); i += lanes) {
        store(block + r * panel + i, add_splits(column + r, row + i));
      }
    }
    transpose_2d(target + column, ld, block, panel, panel, rows);
  }
}

}  // namespace segattn::cpu
