// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/packed_linear_kernel.cuh"

namespace nf {

template <>
void packed_linear<__nv_bfloat16>(const PackedLinearParams& p, cudaStream_t stream) {
  check_and_launch<__nv_bfloat16>(p, stream);
}

}  // namespace nf
