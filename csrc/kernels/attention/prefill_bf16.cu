// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention/prefill.cuh"

namespace nf {

template void prefill_attention(const PrefillAttentionParams<__nv_bfloat16>&, cudaStream_t);

bool has_prefill_attention() {
  return can_overlap<
      prefill::prefill_kernel<prefill::Config<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, 128>>>();
}

}  // namespace nf
