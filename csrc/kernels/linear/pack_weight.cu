// SPDX-License-Identifier: Apache-2.0
// Packs a weight into the format of weight_layout.h. One thread = one 16-byte chunk of the packed weight:
// writes are in order, reads are whole 128-byte lines of a row. Bandwidth bound: moves 2 * N * K elements.
// Runs once per weight, at load.
#include <algorithm>
#include <string>

#include "kernels/common/check.h"
#include "kernels/common/device.cuh"
#include "kernels/common/launch.h"
#include "kernels/linear/linear.h"
#include "kernels/ptx/mbarrier.cuh"

namespace nf {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) pack_weight_kernel(const PackWeightParams p) {
  // Linears read packed weights before they wait. So none starts before all CTAs here have ended
  // (let_successor_start() is left out), each after its writes have reached L2. (PTX promises as much only to
  // kernels that wait.)
  wait_for_predecessor();
  const int64_t num_chunks = p.shape.packed_bytes() / kChunkBytes;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < num_chunks; i += stride) {
    constexpr int kRowChunks = kTileRowBytes / kChunkBytes;
    const int64_t tile = i / (kBlockTileBytes / kChunkBytes);
    const int in_tile = int(i % (kBlockTileBytes / kChunkBytes));
    const int64_t row = tile / p.shape.k_tiles() * kBlockRows + in_tile / kRowChunks;
    const int64_t k_byte =
        tile % p.shape.k_tiles() * kTileRowBytes + (in_tile % kRowChunks ^ row % 8) * kChunkBytes;
    uint4 chunk{};
    if (row < p.shape.num_rows && k_byte < p.shape.row_bytes) {
      const int64_t from = p.interleave ? gate_up_row(row, p.shape.num_rows) : row;
      chunk = *reinterpret_cast<const uint4*>(static_cast<const char*>(p.weight) + from * p.shape.row_bytes +
                                              k_byte);
    }
    static_cast<uint4*>(p.packed)[i] = chunk;
  }
  __threadfence();
#if __CUDA_ARCH__ >= 900
  ptx::fence_proxy_async_global();
#endif
}

}  // namespace

void pack_weight(const PackWeightParams& p, cudaStream_t stream) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kChunkBytes == 0;
  };
  NF_CHECK(aligned(p.packed) && aligned(p.weight), "an address that is no multiple of 16");
  NF_CHECK(p.shape.row_bytes % kChunkBytes == 0, std::to_string(p.shape.row_bytes));
  NF_CHECK(!p.interleave || p.shape.num_rows % 32 == 0, "N=" + std::to_string(p.shape.num_rows));
  const int64_t num_ctas = (p.shape.packed_bytes() / kChunkBytes + kThreads - 1) / kThreads;
  const Grid grid{.ctas = dim3(unsigned(std::min<int64_t>(num_ctas, 1 << 16))), .threads = kThreads};
  launch<pack_weight_kernel>(grid, stream, p);
}

}  // namespace nf
