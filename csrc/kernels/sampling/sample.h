// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nf {

// One token per row; -1 for a row with a NaN. Temperature 0 takes the largest logit, the lowest id among
// equals. Otherwise the kept tokens are those that reach the top-k, top-p and min-p thresholds, and the token
// is argmax((logit - largest) / temperature - log(noise)) over them, with noise that depends on (seed, step,
// id) alone. A row's token does not depend on the other rows.
struct SampleParams {
  int64_t* tokens;           // [S]
  const float* logits;       // [S, V], row stride logits_stride
  const float* temperature;  // [S]
  const int32_t* top_k;      // [S], 0 = off
  const float* top_p;        // [S], >= 1 = off
  const float* min_p;        // [S], 0 = off
  const int64_t* seed;       // [S]
  const int64_t* step;       // [S]
  int64_t num_rows;          // S, may be 0
  int64_t vocab;             // V
  int64_t logits_stride;     // elements between rows
};
void sample(const SampleParams& p, cudaStream_t stream);

// Of log_softmax(logits): the value and the rank (1 = largest) of each row's token, and the num_top largest
// with their ids, descending, equal ones by id.
struct TopLogprobsParams {
  float* chosen;          // [S]
  int64_t* rank;          // [S]
  float* top_values;      // [S, N]
  int64_t* top_ids;       // [S, N]
  const float* logits;    // [S, V], row stride logits_stride
  const int64_t* tokens;  // [S], each in [0, V)
  int64_t num_rows;       // S, may be 0
  int64_t vocab;          // V
  int num_top;            // N, 0..256 and at most V
  int64_t logits_stride;
};
void top_logprobs(const TopLogprobsParams& p, cudaStream_t stream);

}  // namespace nf
