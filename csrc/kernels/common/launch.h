// SPDX-License-Identifier: Apache-2.0
// The one way to launch a kernel.
#pragma once

#include <array>
#include <mutex>

#include "kernels/common/check.h"

namespace nf {

struct Grid {
  dim3 ctas;
  int threads;
  int smem_bytes = 0;  // dynamic shared memory
  int cluster = 1;     // CTAs of a cluster; only kernels written for sm_90 may have more
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

// Of the current device.
inline int num_sms() {
  int device, n;
  NF_CUDA(cudaGetDevice(&device));
  NF_CUDA(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device));
  return n;
}

// Once per kernel and device: allows `max_smem_bytes` of dynamic shared memory, and asks for as much of L1 as
// can be to be shared memory. All kernels ask for the same, because two that disagree cannot share an SM, and
// the overlap of kernels is worth more here than L1 is.
template <auto kKernel>
void prepare(int max_smem_bytes) {
  static std::array<std::once_flag, 64> done;
  int device;
  NF_CUDA(cudaGetDevice(&device));
  std::call_once(done.at(device), [&] {
    NF_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_smem_bytes));
    NF_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared));
  });
}

// A kernel launched here calls wait_for_predecessor() before it touches what others write. One whose
// grid.smem_bytes vary calls prepare() with the largest first.
template <auto kKernel, class... Args>
void launch(const Grid& grid, cudaStream_t stream, const Args&... args) {
  prepare<kKernel>(grid.smem_bytes);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {.x = unsigned(grid.cluster), .y = 1, .z = 1};

  cudaLaunchConfig_t config{};
  config.gridDim = grid.ctas;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = size_t(grid.smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = can_overlap<kKernel>() ? (grid.cluster > 1 ? 2 : 1) : 0;
  NF_CUDA(cudaLaunchKernelEx(&config, kKernel, args...));
}

}  // namespace nf
