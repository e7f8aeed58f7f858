// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention/prefill.cuh"

namespace nf {

template void prefill_attention(const PrefillAttentionParams<__half>&, cudaStream_t);

}  // namespace nf
