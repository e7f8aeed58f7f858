// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include "host/check.h"

// For every CUDA call, and with cudaGetLastError() after work that returns no status.
#define NF_CUDA(call)                                                                                   \
  do {                                                                                                  \
    const cudaError_t status = (call);                                                                  \
    if (status != cudaSuccess) throw ::nf::Error(std::string(#call ": ") + cudaGetErrorString(status)); \
  } while (false)
