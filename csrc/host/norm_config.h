// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

namespace nf {

// How one CTA holds one row of E elements in registers, as 16-byte vectors of 8 elements.
struct NormConfig {
  int threads;          // of the CTA, a multiple of 32
  int vecs_per_thread;  // 1, 2 or 4
  bool operator==(const NormConfig&) const = default;
};

// For T rows. Makes no difference to the results. Throws for an E that is not a multiple of 8 or that no
// config holds.
NormConfig pick_norm_config(int dim, int64_t num_tokens);

std::string to_string(const NormConfig& config);  // "512 threads x 2 vectors"

}  // namespace nf
