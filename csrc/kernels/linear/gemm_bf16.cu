// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/gemm_kernel.cuh"

namespace nf {

template <>
void gemm<__nv_bfloat16>(const PackedLinearParams& p, cudaStream_t stream) {
  launch_gemm<__nv_bfloat16>(p, stream);
}

}  // namespace nf
