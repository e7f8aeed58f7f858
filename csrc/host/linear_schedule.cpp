// SPDX-License-Identifier: Apache-2.0
#include "host/linear_schedule.h"

#include <algorithm>
#include <climits>
#include <string>

#include "host/check.h"
#include "host/weight_layout.h"

namespace nf {
namespace {

// Of a slice: below this the exchange of partial sums costs more than the reading that it spreads.
constexpr int64_t kMinUnits = 4;

}  // namespace

LinearSchedule make_linear_schedule(int64_t num_rows, int64_t num_cols, int element_bytes, int num_tokens,
                                    int num_workers) {
  NF_CHECK(num_workers > 0, std::to_string(num_workers));
  NF_CHECK(num_tokens > 0, std::to_string(num_tokens));
  const PackedShape shape = packed_shape(num_rows, num_cols, element_bytes);
  const int64_t num_pairs = (shape.num_blocks() + 1) / 2, rest = num_tokens % kColumnTokens;
  const int64_t num_columns = (num_tokens + kColumnTokens - 1) / kColumnTokens;
  NF_CHECK(num_pairs * num_columns * shape.k_tiles() <= INT_MAX / 2, "T=" + std::to_string(num_tokens));
  const bool has_half_column = num_columns > 1 && rest > 0 && rest <= kHalfColumnTokens;
  LinearSchedule s{.num_pairs = int(num_pairs),
                   .k_tiles = int(shape.k_tiles()),
                   .num_full_columns = int(num_columns - has_half_column),
                   .has_half_column = has_half_column,
                   .num_whole = 0,
                   .num_slices = 0};
  if (num_columns > 1) {  // whole waves, but for the last one or two
    const int64_t half_tiles = s.num_tiles() - s.num_full_tiles();
    const int64_t waves = (2 * s.num_full_tiles() + half_tiles) / (2 * num_workers) - 1;
    s.num_whole = int(std::clamp<int64_t>(waves, 0, s.num_full_tiles() / num_workers) * num_workers);
  }
  const int64_t shared_units = int64_t(s.num_tiles() - s.num_whole) * s.k_tiles;
  s.num_slices = int(std::clamp<int64_t>(shared_units / kMinUnits, 1, num_workers));
  return s;
}

int padded_tokens(int num_tokens) {
  NF_CHECK(num_tokens > 0, std::to_string(num_tokens));
  for (int padded : {8, 16, 32, kMaxDecodeTokens})
    if (num_tokens <= padded) return padded;
  return kColumnTokens;
}

int64_t linear_workspace_bytes(int num_tokens, int num_sms) {
  NF_CHECK(num_sms > 0, std::to_string(num_sms));
  return int64_t(num_sms) * kBlockRows * padded_tokens(num_tokens) * int64_t(sizeof(float));
}

}  // namespace nf
