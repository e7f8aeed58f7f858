// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nf {

// out[t, :] = weight[ids[t], :], or zeros where the id lies outside the table (another rank's). Rows are
// plain bytes: any type will do. Rows start at multiples of 16 bytes.
struct EmbedParams {
  void* out;           // [T, row_bytes], row stride out_stride_bytes
  const int64_t* ids;  // [T]
  const void* weight;  // [V, row_bytes], row stride weight_stride_bytes
  int64_t num_tokens;  // T, may be 0
  int64_t vocab;       // V
  int64_t row_bytes;   // a multiple of 16
  int64_t out_stride_bytes;
  int64_t weight_stride_bytes;
};
void embed(const EmbedParams& p, cudaStream_t stream);

}  // namespace nf
