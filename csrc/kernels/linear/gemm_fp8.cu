// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/gemm_kernel.cuh"

namespace nf {

template <>
void gemm<__nv_fp8_e4m3>(const PackedLinearParams& p, cudaStream_t stream) {
  launch_gemm<__nv_fp8_e4m3>(p, stream);
}

}  // namespace nf
