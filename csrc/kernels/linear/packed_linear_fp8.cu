// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/packed_linear_kernel.cuh"

namespace nf {

template <>
void packed_linear<__nv_fp8_e4m3>(const PackedLinearParams& p, cudaStream_t stream) {
  check_and_launch<__nv_fp8_e4m3>(p, stream);
}

}  // namespace nf
