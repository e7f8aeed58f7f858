// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nf {

// The three penalties, in the order repetition, frequency, presence, each rounded as written (nothing fused):
// logits of tokens seen in prompt or output are divided by `repetition` where positive, else multiplied; then
// frequency * count and, where count > 0, presence are subtracted.
struct PenalizeParams {
  float* logits;                 // [S, V], row stride logits_stride
  const int32_t* output_counts;  // [S, V], contiguous
  const bool* in_prompt;         // [S, V], contiguous
  const float* presence;         // [S]
  const float* frequency;        // [S]
  const float* repetition;       // [S]
  int64_t num_rows;              // S, may be 0
  int64_t vocab;                 // V
  int64_t logits_stride;
};
void penalize(const PenalizeParams& p, cudaStream_t stream);

}  // namespace nf
