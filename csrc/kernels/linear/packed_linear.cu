// SPDX-License-Identifier: Apache-2.0
// Which kernel a linear takes.
#include <string>

#include "kernels/common/check.h"
#include "kernels/linear/linear.h"

namespace nf {
namespace {

void check(const PackedLinearParams& p, int64_t element_bytes) {
  packed_shape(p.num_rows, p.num_cols, int(element_bytes));
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  NF_CHECK(p.num_tokens >= 0, "T=" + std::to_string(p.num_tokens));
  NF_CHECK(aligned(p.x) && aligned(p.packed) && aligned(p.workspace) && aligned(p.out),
           "an address that is no multiple of 16");
  NF_CHECK(p.x_stride * element_bytes % 16 == 0, "x_stride=" + std::to_string(p.x_stride));
  const int per_vec = p.out_type == OutType::kFp8 ? 16 : p.out_type == OutType::kBfloat16 ? 8 : 4;
  NF_CHECK(p.out_stride % per_vec == 0, "out_stride=" + std::to_string(p.out_stride));
  NF_CHECK(p.epilogue != Epilogue::kAdd || p.out_type == OutType::kBfloat16, "another type");
  NF_CHECK(p.epilogue != Epilogue::kSwiglu || (p.out_type != OutType::kFloat && p.num_rows % 32 == 0),
           "another type or N");
  NF_CHECK((p.out_type == OutType::kFp8) == (p.out_scale != nullptr), "another type");
  NF_CHECK(p.out_type != OutType::kFp8 || p.epilogue == Epilogue::kSwiglu, "another epilogue");
}

template <class Element>
void check_and_launch(const PackedLinearParams& p, cudaStream_t stream) {
  check(p, sizeof(Element));
  if (p.num_tokens == 0) return;
  p.num_tokens <= kMaxFewTokens ? packed_linear_of_few<Element>(p, stream) : gemm<Element>(p, stream);
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
