// SPDX-License-Identifier: Apache-2.0
// Host: descriptions of matrices for the bulk copy engine.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <string>

#include "kernels/common/check.h"

namespace nf::ptx {

// The tensor at `data` with 1 or 2 bytes an element, copied in boxes that are 32, 64 or 128 bytes wide: the
// 16-byte chunks of 256, 512 or 1024 bytes in shared memory are permuted so that 8 rows' same chunks lie in
// different banks, those of 128 as wgmma reads them. Sizes and boxes count elements, the contiguous dimension
// first; `strides`, of the other dimensions, are bytes, multiples of 16 as `data` is. What a box has beyond
// the tensor is zero when it is loaded, and is not stored.
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
  const int width = int(box[0]) * element_bytes;
  NF_CHECK(width == 32 || width == 64 || width == 128, std::to_string(width));
  const auto swizzle = width == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : width == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : CU_TENSOR_MAP_SWIZZLE_32B;
  CUtensorMap map;
  cuuint32_t steps[kRank];
  std::fill_n(steps, kRank, 1);
  const CUresult status =
      encode(&map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             kRank, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  NF_CHECK(status == CUDA_SUCCESS, std::to_string(status));
  return map;
}

// The matrix [num_rows, row_bytes], rows `stride_bytes` apart, in boxes of `box_rows` rows x `box_bytes`.
inline CUtensorMap swizzled_rows_map(const void* data, int64_t num_rows, int64_t row_bytes,
                                     int64_t stride_bytes, int box_rows, int element_bytes,
                                     int box_bytes = 128) {
  return swizzled_map<2>(data, element_bytes, {cuuint64_t(row_bytes / element_bytes), cuuint64_t(num_rows)},
                         {cuuint64_t(stride_bytes)},
                         {cuuint32_t(box_bytes / element_bytes), cuuint32_t(box_rows)});
}

}  // namespace nf::ptx
