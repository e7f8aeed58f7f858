// SPDX-License-Identifier: Apache-2.0
// Which CTA multiplies what when there are few tokens: stream-K over a packed weight (weight_layout.h).
//
// The k tiles of all blocks, K innermost, form one sequence, as they do in memory. It is cut into as many
// equal slices as there are SMs, one per CTA. A slice is a run of pieces, each within one block:
//
//   [tail of a block] [whole blocks ...] [head of a block]
//
// each of which may be absent; or it is one middle part of a single block.
//
// The CTA that has the first k tile of a block owns it. Any other piece of the block is some slice's first
// piece: its CTA leaves the FP32 sums in its own slot of the workspace, and the owner adds the slots in the
// order of K. So the bits of a result depend on (N, K, element size, SM count) alone: not on the number of
// tokens, not on which CTA ran first.
#pragma once

#include <cstdint>

namespace nf {

struct UnitRange {
  int begin, end;  // units: unit / k_tiles is the block, unit % k_tiles the k tile
};

struct LinearSchedule {
  int num_units;  // blocks * k tiles
  int k_tiles;
  int num_slices;  // CTAs

  // Slices differ by one unit at most.
  constexpr int slice_begin(int i) const {
    const int longer = num_units % num_slices;
    return i * (num_units / num_slices) + (i < longer ? i : longer);
  }
  constexpr UnitRange slice(int i) const { return {slice_begin(i), slice_begin(i + 1)}; }
  bool operator==(const LinearSchedule&) const = default;
};

LinearSchedule make_linear_schedule(int64_t num_rows, int64_t num_cols, int element_bytes, int num_sms);

constexpr int kMaxFewTokens = 64;  // of the kernel that works so; more take the GEMM (gemm_schedule.h)

// The workspace of a launch: slots [CTA][2 warpgroups][tokens / 8][128 threads][4] float. A value is its own
// flag: before the first launch, and after each, all bits are set (a NaN that no sum is), which the owner
// takes for "not there yet".
int64_t linear_workspace_bytes(int num_sms);

// The tokens that the kernel for `num_tokens` computes: 8, 16, 32 or 64.
int padded_tokens(int num_tokens);

}  // namespace nf
