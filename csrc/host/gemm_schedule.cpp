// SPDX-License-Identifier: Apache-2.0
#include "host/gemm_schedule.h"

#include <algorithm>
#include <climits>
#include <string>

#include "host/check.h"

namespace nf {

GemmSchedule make_gemm_schedule(int num_blocks, int num_tokens, int max_ctas, int tile_tokens) {
  NF_CHECK(num_blocks > 0, std::to_string(num_blocks));
  NF_CHECK(max_ctas > 0, std::to_string(max_ctas));
  NF_CHECK(num_tokens > 0, std::to_string(num_tokens));
  NF_CHECK(tile_tokens > 0 && tile_tokens % 2 == 0, std::to_string(tile_tokens));
  const int rest = num_tokens % tile_tokens;
  const bool has_half_column = rest > 0 && rest <= tile_tokens / 2;
  const int64_t num_columns = num_tokens / tile_tokens + (rest > tile_tokens / 2);
  NF_CHECK(2 * num_blocks * (num_columns + 1) <= INT_MAX, "T=" + std::to_string(num_tokens));

  const bool is_single = num_columns == 1 && !has_half_column,
             is_read_bound = num_tokens <= kMaxReadBoundTokens;
  const int num_full = int(num_blocks * num_columns), num_half = has_half_column ? num_blocks : 0;
  GemmSchedule whole{.num_ctas = max_ctas,
                     .num_blocks = num_blocks,
                     .num_columns = int(num_columns),
                     .num_full = num_full,
                     .num_tiles = num_full + num_half,
                     .tile_tokens = tile_tokens,
                     .in_three_quarters = false,
                     .cuts_rows = is_single && (is_read_bound || num_full <= max_ctas)};
  GemmSchedule cut = whole;
  const int num_last = num_full % max_ctas;
  cut.num_full -= num_last, cut.num_tiles += num_last;
  GemmSchedule best = cut.quarters() < whole.quarters() ? cut : whole;
  if (is_single && !is_read_bound) {
    GemmSchedule three_quarters = whole;
    three_quarters.num_full = 0, three_quarters.in_three_quarters = true;
    three_quarters.num_tiles = num_blocks / 3 * 4 + (num_blocks % 3 ? num_blocks % 3 + 1 : 0);
    if (three_quarters.quarters() < best.quarters()) best = three_quarters;
  }
  return best;
}

}  // namespace nf
