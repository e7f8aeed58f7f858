// SPDX-License-Identifier: Apache-2.0
// wgmma: D[64, N] (+)= A[64, 32 bytes of K] * B[N, 32 bytes of K]^T by a warpgroup of 128 threads, both
// operands in shared memory, K-major with the 128-byte swizzle, FP32 accumulators. Or A in registers; B of 16
// bits is then [16 of K, N], N contiguous. sm_90a.
//
// Discipline: wgmma_fence, the products of one group, wgmma_commit, wgmma_wait; no one touches the
// accumulators between fence and wait.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/ptx/mbarrier.cuh"

namespace nf::ptx {

constexpr int kWgmmaStepBytes = 32;  // of K, in one instruction

// Describes rows of 128 bytes, swizzled, at a multiple of 1024 bytes: eight rows are 1024 bytes, the offset
// to the next eight.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* shared) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kStride = uint64_t(1024 / 16) << 32,
                     kUnused = uint64_t(1) << 16;
  return kSwizzle128 | kStride | kUnused | (smem_address(shared) & 0x3FFFF) >> 4;
}
// The descriptor `steps` instructions further along K.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, int steps) {
  return descriptor + uint64_t(steps * (kWgmmaStepBytes / 16));
}

// Describes 16 rows of K of a matrix [K, N], N contiguous: rows of 128 bytes, swizzled, at a multiple of 1024
// bytes; the next 64 columns lie `chunk_bytes` further on. The next 16 rows: kWgmmaRowsStep more.
__device__ __forceinline__ uint64_t wgmma_rows_descriptor(const void* shared, uint32_t chunk_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kStride = uint64_t(1024 / 16) << 32;
  return kSwizzle128 | kStride | uint64_t(chunk_bytes / 16) << 16 | (smem_address(shared) & 0x3FFFF) >> 4;
}
constexpr uint64_t kWgmmaRowsStep = 16 * 128 / 16;

// Orders earlier accesses to the accumulator registers before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the committed groups, the youngest, are not done.
template <int kPending = 0>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// After a wait that leaves other products in flight: keeps the compiler from using `d` before it.
template <int kRegisters>
__device__ __forceinline__ void wgmma_settled(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Changes the registers per thread of this warpgroup; takes wait until others have left as many.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// wgmma(Element(), d, a, b, accumulate): d += a * b, or d = a * b. N is twice the number of registers.
#define NF_WGMMA(kElement, kN, kRegisters, kTypes, kA, kB, kAccumulate, kEnd)                     \
  __device__ __forceinline__ void wgmma(kElement, float (&d)[kRegisters], uint64_t a, uint64_t b, \
                                        bool accumulate) {                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " kAccumulate                                  \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN kTypes " {" NF_LIST_##kN           \
                 "}, " kA ", " kB ", p, 1, 1" kEnd ";\n}"                                         \
                 : NF_REGS_##kN                                                                   \
                 : "l"(a), "l"(b), "r"(int(accumulate)));                                         \
  }

// The same with A in registers. Of 16 bits: rounded from accumulators [64, 16], those of columns 0-7 and then
// 8-15, two neighbours a register; b: wgmma_rows_descriptor (kEnd transposes it). Of e4m3: [64, 32], lane 4g
// + q has columns 4q..4q+3 of rows g and g + 8, then the same of columns 16-31.
#define NF_WGMMA_ROWS(kElement, kN, kRegisters, kTypes, kA, kB, kAccumulate, kEnd)                       \
  __device__ __forceinline__ void wgmma(kElement, float (&d)[kRegisters], const uint32_t* a, uint64_t b, \
                                        bool accumulate) {                                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " kAccumulate                                         \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN kTypes " {" NF_LIST_##kN                  \
                 "}, {" kA "}, " kB ", p, 1, 1" kEnd ";\n}"                                              \
                 : NF_REGS_##kN                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));            \
  }

#define NF_LIST_8 "%0, %1, %2, %3"
#define NF_LIST_16 NF_LIST_8 ", %4, %5, %6, %7"
#define NF_LIST_32 NF_LIST_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NF_LIST_48 NF_LIST_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NF_LIST_64 NF_LIST_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NF_LIST_80 NF_LIST_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NF_LIST_96 NF_LIST_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NF_LIST_112 NF_LIST_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NF_LIST_128 NF_LIST_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NF_LIST_160 \
  NF_LIST_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NF_LIST_192 \
  NF_LIST_160 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NF_LIST_224 \
  NF_LIST_192 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NF_LIST_256 \
  NF_LIST_224       \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define NF_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NF_16(i) NF_FOUR(i), NF_FOUR(i + 4)
#define NF_32(i) NF_16(i), NF_16(i + 8)
#define NF_REGS_8 NF_FOUR(0)
#define NF_REGS_16 NF_16(0)
#define NF_REGS_32 NF_32(0)
#define NF_REGS_48 NF_REGS_32, NF_16(16)
#define NF_REGS_64 NF_REGS_48, NF_16(24)
#define NF_REGS_80 NF_REGS_64, NF_16(32)
#define NF_REGS_96 NF_REGS_80, NF_16(40)
#define NF_REGS_112 NF_REGS_96, NF_16(48)
#define NF_REGS_128 NF_REGS_112, NF_16(56)
#define NF_REGS_160 NF_REGS_128, NF_32(64)
#define NF_REGS_192 NF_REGS_160, NF_32(80)
#define NF_REGS_224 NF_REGS_192, NF_32(96)
#define NF_REGS_256 NF_REGS_224, NF_32(112)

#define NF_WGMMA_OF(kElement, kTypes, kEnd)                          \
  NF_WGMMA(kElement, 8, 4, kTypes, "%4", "%5", "%6", kEnd)           \
  NF_WGMMA(kElement, 16, 8, kTypes, "%8", "%9", "%10", kEnd)         \
  NF_WGMMA(kElement, 32, 16, kTypes, "%16", "%17", "%18", kEnd)      \
  NF_WGMMA(kElement, 48, 24, kTypes, "%24", "%25", "%26", kEnd)      \
  NF_WGMMA(kElement, 64, 32, kTypes, "%32", "%33", "%34", kEnd)      \
  NF_WGMMA(kElement, 80, 40, kTypes, "%40", "%41", "%42", kEnd)      \
  NF_WGMMA(kElement, 96, 48, kTypes, "%48", "%49", "%50", kEnd)      \
  NF_WGMMA(kElement, 112, 56, kTypes, "%56", "%57", "%58", kEnd)     \
  NF_WGMMA(kElement, 128, 64, kTypes, "%64", "%65", "%66", kEnd)     \
  NF_WGMMA(kElement, 160, 80, kTypes, "%80", "%81", "%82", kEnd)     \
  NF_WGMMA(kElement, 192, 96, kTypes, "%96", "%97", "%98", kEnd)     \
  NF_WGMMA(kElement, 224, 112, kTypes, "%112", "%113", "%114", kEnd) \
  NF_WGMMA(kElement, 256, 128, kTypes, "%128", "%129", "%130", kEnd)
NF_WGMMA_OF(__nv_fp8_e4m3, "k32.f32.e4m3.e4m3", "")
NF_WGMMA_OF(__nv_bfloat16, "k16.f32.bf16.bf16", ", 0, 0")
NF_WGMMA(__half, 128, 64, "k16.f32.f16.f16", "%64", "%65", "%66", ", 0, 0")
NF_WGMMA_ROWS(__nv_bfloat16, 64, 32, "k16.f32.bf16.bf16", "%32, %33, %34, %35", "%36", "%37", ", 1")
NF_WGMMA_ROWS(__nv_bfloat16, 128, 64, "k16.f32.bf16.bf16", "%64, %65, %66, %67", "%68", "%69", ", 1")
NF_WGMMA_ROWS(__half, 64, 32, "k16.f32.f16.f16", "%32, %33, %34, %35", "%36", "%37", ", 1")
NF_WGMMA_ROWS(__half, 128, 64, "k16.f32.f16.f16", "%64, %65, %66, %67", "%68", "%69", ", 1")
NF_WGMMA_ROWS(__nv_fp8_e4m3, 128, 64, "k32.f32.e4m3.e4m3", "%64, %65, %66, %67", "%68", "%69", "")

#undef NF_WGMMA
#undef NF_WGMMA_OF
#undef NF_WGMMA_ROWS
#undef NF_FOUR
#undef NF_16
#undef NF_32
#undef NF_LIST_8
#undef NF_LIST_16
#undef NF_LIST_32
#undef NF_LIST_48
#undef NF_LIST_64
#undef NF_LIST_80
#undef NF_LIST_96
#undef NF_LIST_112
#undef NF_LIST_128
#undef NF_LIST_160
#undef NF_LIST_192
#undef NF_LIST_224
#undef NF_LIST_256
#undef NF_REGS_8
#undef NF_REGS_16
#undef NF_REGS_32
#undef NF_REGS_48
#undef NF_REGS_64
#undef NF_REGS_80
#undef NF_REGS_96
#undef NF_REGS_112
#undef NF_REGS_128
#undef NF_REGS_160
#undef NF_REGS_192
#undef NF_REGS_224
#undef NF_REGS_256

}  // namespace nf::ptx
