// SPDX-License-Identifier: Apache-2.0
// The one way to launch a kernel.
#pragma once

#include "kernels/common/check.h"

namespace nf {

struct Grid {
  dim3 ctas;
  int threads;
};

// May this kernel overlap the one before it in the stream? (Programmatic dependent launch.)
//
// A kernel launched so starts before its predecessor has finished, and must execute wait_for_predecessor()
// (device.cuh) before it touches anything that other kernels write or read. That instruction exists from
// sm_90 on only. So ask for the architecture that the loaded code was *written* for: PTX of compute_80
// compiled for a Hopper GPU has no wait in it.
template <auto kKernel>
bool can_overlap() {
  static const bool can = [] {
    cudaFuncAttributes attributes;
    NF_CUDA(cudaFuncGetAttributes(&attributes, kKernel));
    return attributes.ptxVersion >= 90;
  }();
  return can;
}

// Every kernel launched here calls wait_for_predecessor() in each thread.
template <auto kKernel, class... Args>
void launch(const Grid& grid, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;

  cudaLaunchConfig_t config{};
  config.gridDim = grid.ctas;
  config.blockDim = dim3(grid.threads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = can_overlap<kKernel>() ? 1 : 0;
  NF_CUDA(cudaLaunchKernelEx(&config, kKernel, args...));
}

}  // namespace nf
