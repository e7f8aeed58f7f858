// SPDX-License-Identifier: Apache-2.0
// What does not depend on the type of q.
#include "kernels/attention/attention.cuh"

namespace nf {

int64_t attention_workspace_bytes() {
  using Largest = attn::Partial<attn::Config<__nv_bfloat16, false, 128, 2>>;
  return int64_t(num_sms()) * attn::kMaxCtasPerSm * attn::kPartialsPerCta * int64_t(sizeof(Largest));
}

}  // namespace nf
