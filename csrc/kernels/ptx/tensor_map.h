// SPDX-License-Identifier: Apache-2.0
// Host: descriptions of matrices for the bulk copy engine.
#pragma once

#include <cuda.h>

#include <string>

#include "kernels/common/check.h"

namespace nf::ptx {

// The matrix [num_rows, row_bytes] at `data`, rows `stride_bytes` apart, copied in boxes of `box_rows` rows
// of 128 bytes, swizzled as wgmma reads them. What a box has beyond the matrix is zero. Elements are 1 or 2
// bytes; coordinates count elements. `data` and `stride_bytes` are multiples of 16.
inline CUtensorMap swizzled_rows_map(const void* data, int64_t num_rows, int64_t row_bytes,
                                     int64_t stride_bytes, int box_rows, int element_bytes) {
  // Asked of the driver through the runtime: nothing here links against libcuda.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    NF_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                             &found));
    NF_CHECK(found == cudaDriverEntryPointSuccess, std::to_string(found));
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(row_bytes / element_bytes), cuuint64_t(num_rows)};
  const cuuint64_t strides[] = {cuuint64_t(stride_bytes)};  // of all dimensions but the first
  const cuuint32_t box[] = {cuuint32_t(128 / element_bytes), cuuint32_t(box_rows)}, steps[] = {1, 1};
  const CUresult status = encode(
      &map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  NF_CHECK(status == CUDA_SUCCESS, std::to_string(status));
  return map;
}

}  // namespace nf::ptx
