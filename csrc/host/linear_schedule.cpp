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

LinearSchedule make_linear_schedule(int64_t num_rows, int64_t num_cols, int element_bytes, int num_sms) {
  NF_CHECK(num_sms > 0, std::to_string(num_sms));
  const PackedShape shape = packed_shape(num_rows, num_cols, element_bytes);
  const int64_t num_units = shape.num_blocks() * shape.k_tiles();
  NF_CHECK(num_units <= INT_MAX, std::to_string(num_units));
  const int64_t num_slices = std::clamp<int64_t>(num_units / kMinUnits, 1, num_sms);
  return {.num_units = int(num_units),
          .k_tiles = int(shape.k_tiles()),
          .num_slices = int(num_slices),
          .slice_size = int(num_units / num_slices),
          .num_longer = int(num_units % num_slices)};
}

int padded_tokens(int num_tokens) {
  for (int padded : {8, kMaxSplitTokens})
    if (num_tokens <= padded) return padded;
  throw Error("padded_tokens: want T <= 16, found T=" + std::to_string(num_tokens));
}

int64_t linear_workspace_bytes(int num_sms) {
  NF_CHECK(num_sms > 0, std::to_string(num_sms));
  return int64_t(num_sms) * kBlockRows * kMaxSplitTokens * int64_t(sizeof(float));
}

}  // namespace nf
