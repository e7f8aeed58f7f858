// SPDX-License-Identifier: Apache-2.0
// What does not depend on the type of q.
#include "kernels/attention/attention.cuh"

namespace nf {

int64_t attention_partial_floats() {
  int device, num_sms;
  NF_CUDA(cudaGetDevice(&device));
  NF_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  constexpr int kLargest = attn::Config<__nv_bfloat16, false, 128, 2>::kPartialFloats;
  return int64_t(num_sms) * attn::kCtasPerSm * attn::kPartialsPerCta * kLargest;
}

int64_t attention_counters() { return attn::kCounters; }

}  // namespace nf
