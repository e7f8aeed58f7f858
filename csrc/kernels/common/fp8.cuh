// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace nf {

// Two e4m3, in the low bytes, as two halves: exact.
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t pair) {
  const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(pair), __NV_E4M3);
  return uint32_t(h.x) | uint32_t(h.y) << 16;
}

}  // namespace nf
