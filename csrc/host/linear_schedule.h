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
  int slice_size;  // units; the first num_longer slices have one more
  int num_longer;

  constexpr int size(int slice) const { return slice_size + (slice < num_longer ? 1 : 0); }
  constexpr int slice_begin(int i) const { return i * slice_size + (i < num_longer ? i : num_longer); }
  constexpr UnitRange slice(int i) const { return {slice_begin(i), slice_begin(i + 1)}; }
  // The first slice that begins behind a unit.
  constexpr int next_slice(int unit) const {
    const int rest = unit - num_longer * (slice_size + 1);
    return 1 + (rest < 0 ? unit / (slice_size + 1) : num_longer + rest / slice_size);
  }
  bool operator==(const LinearSchedule&) const = default;
};

LinearSchedule make_linear_schedule(int64_t num_rows, int64_t num_cols, int element_bytes, int num_sms);

// Up to kMaxFewTokens are summed in these pieces, so that a token's bits do not depend on the others. With
// more than kMaxSplitTokens a CTA of the GEMM (gemm_schedule.h) computes all pieces of its blocks, one after
// another: that takes no exchange, and the whole of an SM for one ring. (All linears, norms and attention of
// 64 sequences of 128 tokens take 17.15 ms so on an H100, 17.55 split; of 32 sequences 16.54 and 16.65.
// Weights of zero.)
constexpr int kMaxFewTokens = 64, kMaxSplitTokens = 16;

// The workspace of a launch: slots [CTA][2 warpgroups][tokens / 8][128 threads][4] float. A value is its own
// flag: before the first launch, and after each, all bits are set (a NaN that no sum is), which the owner
// takes for "not there yet".
int64_t linear_workspace_bytes(int num_sms);

// The tokens that the kernel for `num_tokens` computes: 8 or 16.
int padded_tokens(int num_tokens);

}  // namespace nf
