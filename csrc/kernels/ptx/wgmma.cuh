// SPDX-License-Identifier: Apache-2.0
// wgmma: D[64, N] (+)= A[64, 32 bytes of K] * B[N, 32 bytes of K]^T by a warpgroup of 128 threads, both
// operands in shared memory, K-major with the 128-byte swizzle, FP32 accumulators. Or A in registers and B
// [16 of K, N], N contiguous. sm_90a.
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
#define NF_WGMMA(kElement, kRegisters, kInstruction, kList, kA, kB, kAccumulate, kEnd, ...)                \
  __device__ __forceinline__ void wgmma(kElement, float(&d)[kRegisters], uint64_t a, uint64_t b,           \
                                        bool accumulate) {                                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " kAccumulate ", 0;\n" kInstruction " {" kList "}, " kA \
                 ", " kB ", p, 1, 1" kEnd ";\n}"                                                           \
                 : __VA_ARGS__                                                                             \
                 : "l"(a), "l"(b), "r"(int(accumulate)));                                                  \
  }

// The same with A in registers, rounded from accumulators [64, 16]: those of columns 0-7 and then 8-15, two
// neighbours a register. b: wgmma_rows_descriptor.
#define NF_WGMMA_ROWS(kElement, kRegisters, kInstruction, kList, kA, kB, kAccumulate, ...)                  \
  __device__ __forceinline__ void wgmma(kElement, float(&d)[kRegisters], const uint32_t* a, uint64_t b,     \
                                        bool accumulate) {                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " kAccumulate ", 0;\n" kInstruction " {" kList "}, {" kA \
                 "}, " kB ", p, 1, 1, 1;\n}"                                                                \
                 : __VA_ARGS__                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));               \
  }

#define NF_LIST_8 "%0, %1, %2, %3"
#define NF_REGS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define NF_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NF_REGS_16 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define NF_LIST_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NF_REGS_32                                                                                \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define NF_LIST_64                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NF_REGS_64                                                                                          \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),           \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),            \
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),            \
      "+f"(d[30]), "+f"(d[31])
#define NF_LIST_128                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
  "%59, %60, %61, %62, %63"
#define NF_64_OF(v)                                                                                         \
  "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3]), "+f"(v[4]), "+f"(v[5]), "+f"(v[6]), "+f"(v[7]),           \
      "+f"(v[8]), "+f"(v[9]), "+f"(v[10]), "+f"(v[11]), "+f"(v[12]), "+f"(v[13]), "+f"(v[14]), "+f"(v[15]), \
      "+f"(v[16]), "+f"(v[17]), "+f"(v[18]), "+f"(v[19]), "+f"(v[20]), "+f"(v[21]), "+f"(v[22]),            \
      "+f"(v[23]), "+f"(v[24]), "+f"(v[25]), "+f"(v[26]), "+f"(v[27]), "+f"(v[28]), "+f"(v[29]),            \
      "+f"(v[30]), "+f"(v[31]), "+f"(v[32]), "+f"(v[33]), "+f"(v[34]), "+f"(v[35]), "+f"(v[36]),            \
      "+f"(v[37]), "+f"(v[38]), "+f"(v[39]), "+f"(v[40]), "+f"(v[41]), "+f"(v[42]), "+f"(v[43]),            \
      "+f"(v[44]), "+f"(v[45]), "+f"(v[46]), "+f"(v[47]), "+f"(v[48]), "+f"(v[49]), "+f"(v[50]),            \
      "+f"(v[51]), "+f"(v[52]), "+f"(v[53]), "+f"(v[54]), "+f"(v[55]), "+f"(v[56]), "+f"(v[57]),            \
      "+f"(v[58]), "+f"(v[59]), "+f"(v[60]), "+f"(v[61]), "+f"(v[62]), "+f"(v[63])
#define NF_REGS_128 NF_64_OF(d)

NF_WGMMA(__nv_fp8_e4m3, 4, "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3", NF_LIST_8, "%4", "%5", "%6",
         "", NF_REGS_8)
NF_WGMMA(__nv_fp8_e4m3, 8, "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3", NF_LIST_16, "%8", "%9",
         "%10", "", NF_REGS_16)
NF_WGMMA(__nv_fp8_e4m3, 16, "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3", NF_LIST_32, "%16", "%17",
         "%18", "", NF_REGS_32)
NF_WGMMA(__nv_fp8_e4m3, 32, "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3", NF_LIST_64, "%32", "%33",
         "%34", "", NF_REGS_64)
NF_WGMMA(__nv_fp8_e4m3, 64, "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", NF_LIST_128, "%64",
         "%65", "%66", "", NF_REGS_128)
NF_WGMMA(__nv_bfloat16, 4, "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16", NF_LIST_8, "%4", "%5", "%6",
         ", 0, 0", NF_REGS_8)
NF_WGMMA(__nv_bfloat16, 8, "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16", NF_LIST_16, "%8", "%9",
         "%10", ", 0, 0", NF_REGS_16)
NF_WGMMA(__nv_bfloat16, 16, "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16", NF_LIST_32, "%16", "%17",
         "%18", ", 0, 0", NF_REGS_32)
NF_WGMMA(__nv_bfloat16, 32, "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", NF_LIST_64, "%32", "%33",
         "%34", ", 0, 0", NF_REGS_64)
NF_WGMMA(__nv_bfloat16, 64, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", NF_LIST_128, "%64",
         "%65", "%66", ", 0, 0", NF_REGS_128)
NF_WGMMA(__half, 64, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", NF_LIST_128, "%64", "%65", "%66",
         ", 0, 0", NF_REGS_128)
NF_WGMMA_ROWS(__nv_bfloat16, 32, "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", NF_LIST_64,
              "%32, %33, %34, %35", "%36", "%37", NF_REGS_64)
NF_WGMMA_ROWS(__nv_bfloat16, 64, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", NF_LIST_128,
              "%64, %65, %66, %67", "%68", "%69", NF_REGS_128)
NF_WGMMA_ROWS(__half, 32, "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16", NF_LIST_64,
              "%32, %33, %34, %35", "%36", "%37", NF_REGS_64)
NF_WGMMA_ROWS(__half, 64, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", NF_LIST_128,
              "%64, %65, %66, %67", "%68", "%69", NF_REGS_128)

// N = 256: the first 128 columns are accumulated in `low`, the others in `high`.
__device__ __forceinline__ void wgmma(__nv_bfloat16, float (&low)[64], float (&high)[64], uint64_t a,
                                      uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
      "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "
      "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, "
      "%71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "
      "%91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "
      "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "
      "%126, %127}, %128, %129, p, 1, 1, 0, 0;\n}"
      : NF_64_OF(low), NF_64_OF(high)
      : "l"(a), "l"(b), "r"(int(accumulate)));
}

#undef NF_WGMMA
#undef NF_WGMMA_ROWS
#undef NF_LIST_8
#undef NF_REGS_8
#undef NF_LIST_16
#undef NF_REGS_16
#undef NF_LIST_32
#undef NF_REGS_32
#undef NF_LIST_64
#undef NF_REGS_64
#undef NF_LIST_128
#undef NF_REGS_128
#undef NF_64_OF

}  // namespace nf::ptx
