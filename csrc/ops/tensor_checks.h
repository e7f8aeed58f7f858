// SPDX-License-Identifier: Apache-2.0
// What an op needs of its tensors: checks whose messages give name, found and wanted, typed pointers, the
// current stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>

#include "host/check.h"

namespace nf::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

[[noreturn]] inline void reject(const char* name, const std::string& found_and_wanted) {
  throw Error(std::string(name) + ": " + found_and_wanted);
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  const int64_t want = int64_t(shape.size());
  if (t.dim() != want) reject(name, "has " + std::to_string(t.dim()) + " dims, want " + std::to_string(want));
  for (int64_t i = 0; i < want; ++i) {
    const int64_t size = shape.begin()[i];
    if (t.size(i) != size)
      reject(name, "dim " + std::to_string(i) + " is " + std::to_string(t.size(i)) + ", want " +
                       std::to_string(size));
  }
}

inline void check_dtype(const Tensor& t, ScalarType want, const char* name) {
  if (t.scalar_type() != want)
    reject(name, std::string("dtype is ") + toString(t.scalar_type()) + ", want " + toString(want));
}

inline void check_device(const Tensor& t, const Tensor& like, const char* name) {
  if (!t.is_cuda() || t.get_device_index() != like.get_device_index())
    reject(name, "is not on cuda:" + std::to_string(like.get_device_index()));
}

// A matrix whose rows kernels read and write as 16-byte vectors: contiguous within a row, rows at multiples
// of 16 bytes.
inline void check_rows(const Tensor& t, const char* name) {
  const int64_t per_vec = 16 / int64_t(t.element_size());
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1)
    reject(name, "stride of the last dim is " + std::to_string(t.stride(last)) + ", want 1");
  if (last > 0 && t.size(0) > 1 && t.stride(0) % per_vec != 0)
    reject(name, "row stride is " + std::to_string(t.stride(0)) + ", want a multiple of " +
                     std::to_string(per_vec));
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) reject(name, "address is no multiple of 16");
}

// The stride of a lone row means nothing, and may be anything.
inline int64_t row_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : 0; }

template <class T>
T* ptr(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <class T>
const T* cptr(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Calls f with a value of the 2-byte type that t holds.
template <class F>
void dispatch_half_types(const Tensor& t, const char* name, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Half:
      return f(__half{});
    default:
      reject(name, std::string("dtype is ") + toString(t.scalar_type()) + ", want BFloat16 or Half");
  }
}

// The stable ABI of torch 2.11 has no header for this, and CPU-only torch has no such function: ask the
// library that is loaded whenever a CUDA tensor exists.
inline cudaStream_t current_stream(const Tensor& t) {
  using GetStream = AOTITorchError (*)(int32_t device, void** stream);
  static const auto get_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* function = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (!function)
      throw Error(
          "current_stream: this torch has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(function);
  }();
  void* stream = nullptr;
  if (get_stream(t.get_device_index(), &stream) != AOTI_TORCH_SUCCESS)
    throw Error("current_stream: torch reports an error");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace nf::ops
