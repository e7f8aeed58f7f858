// SPDX-License-Identifier: Apache-2.0
#include "kernels/linear/packed_linear_kernel.cuh"

namespace nf {

template <>
void packed_linear_of_few<__nv_bfloat16>(const PackedLinearParams& p, cudaStream_t stream) {
  launch_for_few_tokens<__nv_bfloat16>(p, stream);
}

}  // namespace nf
