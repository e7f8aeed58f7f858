// SPDX-License-Identifier: Apache-2.0
// Which kernel a linear takes.
#include <string>

#include "kernels/common/check.h"
#include "kernels/linear/linear.h"

namespace nf {
namespace {

void check(const PackedLinearParams& p, int element_bytes) {
  const PackedShape shape = packed_shape(p.num_rows, p.num_cols, element_bytes);
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool makes_x = p.x_rows.stats != nullptr;
  const int64_t out_bytes = p.out_type == OutType::kFp8 ? 1 : p.out_type == OutType::kBfloat16 ? 2 : 4;
  NF_CHECK(p.num_tokens >= 0, "T=" + std::to_string(p.num_tokens));
  NF_CHECK(aligned(p.x) && aligned(p.packed) && aligned(p.workspace) && aligned(p.out),
           "an address that is no multiple of 16");
  NF_CHECK(p.x_stride * (makes_x ? 2 : element_bytes) % 16 == 0, "x_stride=" + std::to_string(p.x_stride));
  NF_CHECK(p.out_stride * out_bytes % 16 == 0, "out_stride=" + std::to_string(p.out_stride));
  NF_CHECK(p.schedule.k_tiles == shape.k_tiles(), std::to_string(p.schedule.k_tiles));
  NF_CHECK(p.schedule.num_units == shape.num_blocks() * shape.k_tiles(),
           std::to_string(p.schedule.num_units));
  NF_CHECK(p.epilogue != Epilogue::kAdd || p.out_type == OutType::kBfloat16, "another type");
  NF_CHECK(p.epilogue != Epilogue::kSwiglu || (p.out_type != OutType::kFloat && p.num_rows % 32 == 0),
           "another type or N");
  NF_CHECK((p.out_type == OutType::kFp8) == (p.out_scale != nullptr), "another type");
  NF_CHECK(p.out_type != OutType::kFp8 || p.epilogue == Epilogue::kSwiglu, "another epilogue");
  NF_CHECK(!makes_x || (p.num_tokens <= kMaxTokensWithStats && !p.x_scale), "a scale or T");
  NF_CHECK(!p.out_stats || (p.num_tokens <= kMaxTokensWithStats && p.epilogue != Epilogue::kStore &&
                            p.out_type == OutType::kBfloat16),
           "another epilogue or T");
}

template <class Element>
void check_and_launch(const PackedLinearParams& p, cudaStream_t stream) {
  check(p, sizeof(Element));
  if (p.num_tokens == 0) return;
  p.num_tokens <= kMaxSplitTokens ? packed_linear_of_few<Element>(p, stream) : gemm<Element>(p, stream);
}

}  // namespace

template <>
void packed_linear<__nv_fp8_e4m3>(const PackedLinearParams& p, cudaStream_t stream) {
  check_and_launch<__nv_fp8_e4m3>(p, stream);
}
template <>
void packed_linear<__nv_bfloat16>(const PackedLinearParams& p, cudaStream_t stream) {
  check_and_launch<__nv_bfloat16>(p, stream);
}

}  // namespace nf
