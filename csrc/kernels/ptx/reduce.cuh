// SPDX-License-Identifier: Apache-2.0
// Additions that memory performs: nothing comes back. sm_90.
#pragma once

#include <cstdint>

namespace nf::ptx {

// to[0..8) += v, each rounded to bf16; `to` is at a multiple of 16 bytes.
__device__ __forceinline__ void add_bf16(void* to, const uint32_t (&v)[4]) {
  asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

}  // namespace nf::ptx
