// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention/attention.cuh"

namespace nf {

template void attention(const AttentionParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace nf
