// SPDX-License-Identifier: Apache-2.0
// Host: descriptions of matrices for the bulk copy engine.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <string>

#include "kernels/common/check.h"

namespace nf::ptx {

// The tensor at `data` with 1 or 2 bytes an element, copied in boxes that are 128 bytes wide, swizzled as
// wgmma reads them. Sizes and boxes count elements, the contiguous dimension first; `strides`, of the other
// dimensions, are bytes, multiples of 16 as `data` is. What a box has beyond the tensor is zero.
template <int kRank>
CUtensorMap swizzled_map(const void* data, int element_bytes, const cuuint64_t (&sizes)[kRank],
                         const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
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
  cuuint32_t steps[kRank];
  std::fill_n(steps, kRank, 1);
  const CUresult status = encode(
      &map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  NF_CHECK(status == CUDA_SUCCESS, std::to_string(status));
  return map;
}

// The matrix [num_rows, row_bytes], rows `stride_bytes` apart, in boxes of `box_rows` rows.
inline CUtensorMap swizzled_rows_map(const void* data, int64_t num_rows, int64_t row_bytes,
                                     int64_t stride_bytes, int box_rows, int element_bytes) {
  return swizzled_map<2>(data, element_bytes, {cuuint64_t(row_bytes / element_bytes), cuuint64_t(num_rows)},
                         {cuuint64_t(stride_bytes)}, {cuuint32_t(128 / element_bytes), cuuint32_t(box_rows)});
}

}  // namespace nf::ptx
