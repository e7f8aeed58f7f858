// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention/attention.cuh"

namespace nf {

template void attention(const AttentionParams<__half>&, cudaStream_t);

}  // namespace nf
