// SPDX-License-Identifier: Apache-2.0
#include "host/weight_layout.h"

#include <string>

#include "host/check.h"

namespace nf {

PackedShape packed_shape(int64_t num_rows, int64_t num_cols, int element_bytes) {
  NF_CHECK(element_bytes == 1 || element_bytes == 2, std::to_string(element_bytes));
  NF_CHECK(num_rows > 0 && num_rows % 16 == 0, "N=" + std::to_string(num_rows));
  NF_CHECK(num_cols > 0 && num_cols % 16 == 0, "K=" + std::to_string(num_cols));
  return {num_rows, num_cols * element_bytes};
}

}  // namespace nf
