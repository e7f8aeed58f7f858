// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/check.h"

// Zeros on the GPU, until the process ends.
template <class T>
T* allocate(int64_t size) {
  void* p;
  NF_CUDA(cudaMalloc(&p, size_t(size) * sizeof(T)));
  NF_CUDA(cudaMemset(p, 0, size_t(size) * sizeof(T)));
  NF_CUDA(cudaStreamSynchronize(nullptr));  // the benches' streams do not wait for the default one
  return static_cast<T*>(p);
}
