// Channel attention: products of channels, contracted over positions: result(m, n) = sum_p left(m, p) right(n, p).
//
// The positions are cut into splits, each summed into a matrix of its own; whoever reads the result adds the splits in
// order (load_rows). The cut depends on the sizes alone, so the sums do not depend on the number of threads.
//
// A unit takes a block of columns (rows of `right`) of one split, kPositionBlock positions at a time: it packs `right`
// by transposing and multiplies. Where left is right (Left::data is null), the packed panels also serve as the
// A operand, so that nothing is packed twice, and only the blocks on and above the diagonal are computed; load_rows
// mirrors them.
#pragma once

#include <span>

#include "cpu/common/pack.h"
#include "cpu/common/parallel.h"

namespace segattn::cpu {

// How one contraction is cut and stored.
template <class P>
struct ContractionPlan {
  static constexpr std::int64_t kPanel = panel_columns<P>;

  std::int64_t rows, columns, positions;
  std::int64_t splits, column_blocks;

  // Many positions: wide blocks (each packed element takes part in more products) and several splits. Few: narrow
  // blocks, as a matrix for each split would be more work to add up than to compute.
  ContractionPlan(std::int64_t rows_, std::int64_t columns_, std::int64_t positions_)
      : rows(rows_), columns(columns_), positions(positions_) {
    constexpr std::int64_t kUnits = 8;
    const std::int64_t panels = (columns + kPanel - 1) / kPanel;
    const std::int64_t widest = positions >= 2048 ? 528 : 144;
    column_blocks = std::clamp<std::int64_t>((columns + widest - 1) / widest, 1, panels);
    splits = std::clamp<std::int64_t>(
        (kUnits + column_blocks - 1) / column_blocks, 1, std::max<std::int64_t>(1, positions / 1024));
  }

  std::int64_t leading_dimension() const { return padded_columns<P>(columns); }
  std::int64_t split_size() const { return rows * leading_dimension(); }
  std::int64_t size() const { return splits * split_size(); }
  std::int64_t units() const { return splits * column_blocks; }

  std::int64_t first_position(std::int64_t split) const { return positions * split / splits; }
  // Blocks start at panels.
  std::int64_t first_column(std::int64_t block) const {
    const std::int64_t panels = (columns + kPanel - 1) / kPanel;
    return std::min(columns, panels * block / column_blocks * kPanel);
  }
  std::int64_t widest_block() const {
    const std::int64_t panels = (columns + kPanel - 1) / kPanel;
    return (panels + column_blocks - 1) / column_blocks * kPanel;
  }
};

// Computes one contraction or, with the same `right` packed just once, two.
template <class T>
class ChannelContraction {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  static constexpr std::int64_t kPanel = panel_columns<P>;

  // A panel of B (48 columns of float) takes 24 KB: half of a 48 KB first-level cache, the rest is for A.
  static constexpr std::int64_t kPositionBlock = kIsPair<P> ? 256 : 128;

 public:
  struct Left {
    const T* data;  // (m, positions), null: the same as right
    A* result;      // [splits][m][leading dimension]
  };

  // right: (n, positions). All of `left` have plan.rows rows.
  ChannelContraction(const ContractionPlan<P>& plan, const T* right, std::span<const Left> left)
      : plan_(plan), right_(right), left_(left) {}

  static std::size_t scratch(const ContractionPlan<P>& plan) {
    const std::int64_t widest = std::max(plan.widest_block(), round_up(plan.columns, kPanel));
    return scratch_bytes<P>(packed_b_size<P>(widest, kPositionBlock)) +
        scratch_bytes<P>(packed_a_size<P>(plan.rows, kPositionBlock));
  }

  void run_unit(std::int64_t unit, Scratch& scratch) const {
    const std::int64_t split = unit % plan_.splits;
    // The symmetric half has more rows towards the last block: those first.
    const std::int64_t block = plan_.column_blocks - 1 - unit / plan_.splits;
    const std::int64_t end = plan_.first_position(split + 1);
    const std::int64_t first_column = plan_.first_column(block);
    const std::int64_t end_column = plan_.first_column(block + 1);
    bool symmetric = false;
    for (const Left& left : left_) {
      symmetric |= left.data == nullptr;
    }
    // The symmetric product takes its A operand from the packed columns left of the block too.
    const std::int64_t packed_begin = symmetric ? 0 : first_column;
    if (plan_.positions == 0) {
      fill_zero(first_column, end_column);
      return;
    }
    P* const packed_right = scratch.take<P>(packed_b_size<P>(end_column - packed_begin, kPositionBlock));
    P* const packed_left = scratch.take<P>(packed_a_size<P>(plan_.rows, kPositionBlock));
    for (std::int64_t position = plan_.first_position(split); position < end; position += kPositionBlock) {
      const std::int64_t count = std::min(kPositionBlock, end - position);
      const GemmMode mode = position == plan_.first_position(split) ? GemmMode::store : GemmMode::add;
      pack_b_from_columns<P>(
          packed_right, right_ + packed_begin * plan_.positions + position, plan_.positions, end_column - packed_begin,
          count);
      for (const Left& left : left_) {
        A* const result = left.result + split * plan_.split_size();
        if (left.data == nullptr) {
          multiply_symmetric(packed_right, first_column, end_column, k_steps<P>(count), mode, result);
        } else {
          pack_a_from_rows<P>(packed_left, left.data + position, plan_.positions, plan_.rows, count);
          tile_gemm<P>(
              AOperand<P>::packed(packed_left), packed_right + (first_column - packed_begin) * k_steps<P>(count),
              COperand<A>::row_major(result + first_column, plan_.leading_dimension()), plan_.rows,
              end_column - first_column, k_steps<P>(count), mode);
        }
      }
    }
  }

 private:
  // Blocks on and above the diagonal of columns [first_column, end_column); a panel of packed columns is, read
  // across, an A operand of as many rows.
  void multiply_symmetric(
      const P* packed, std::int64_t first_column, std::int64_t end_column, std::int64_t steps, GemmMode mode,
      A* result) const {
    for (std::int64_t column = first_column; column < end_column; column += kPanel) {
      const std::int64_t columns = std::min(kPanel, end_column - column);
      for (std::int64_t row = 0; row <= column; row += kPanel) {
        const std::int64_t rows = std::min(kPanel, plan_.rows - row);
        const std::int64_t row_width = panel_width<P>(end_column, row);
        tile_gemm<P>(
            AOperand<P>::strided(packed + row * steps, row_width, 1), packed + column * steps,
            COperand<A>::row_major(result + row * plan_.leading_dimension() + column, plan_.leading_dimension()), rows,
            columns, steps, mode);
      }
    }
  }

  void fill_zero(std::int64_t first_column, std::int64_t end_column) const {
    for (const Left& left : left_) {
      for (std::int64_t row = 0; row < plan_.rows; ++row) {
        std::fill_n(
            left.result + row * plan_.leading_dimension() + first_column, padded_columns<P>(end_column - first_column),
            A(0));
      }
    }
  }

  const ContractionPlan<P>& plan_;
  const T* right_;
  std::span<const Left> left_;
};

// Rows [row, row + rows) of the result, splits added in order: target [rows][leading dimension]. `row` starts a panel
// and rows is at most a panel.
template <class P, class A>
void load_rows(
    const ContractionPlan<P>& plan, const A* result, bool symmetric, std::int64_t row, std::int64_t rows, A* target) {
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
    for (std::int64_t column = symmetric ? row : 0; column < ld; column += lanes) {
      store(target + r * ld + column, add_splits(row + r, column));
    }
  }
  if (!symmetric) {
    return;
  }
  A block[panel * panel];
  for (std::int64_t column = 0; column < row; column += panel) {  // mirrored: rows `column`.., columns `row`..
    for (std::int64_t r = 0; r < panel; ++r) {
      for (std::int64_t i = 0; i < padded_columns<P>(rows); i += lanes) {
        store(block + r * panel + i, add_splits(column + r, row + i));
      }
    }
    transpose_2d(target + column, ld, block, panel, panel, rows);
  }
}

}  // namespace segattn::cpu
