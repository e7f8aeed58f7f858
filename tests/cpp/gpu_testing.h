// SPDX-License-Identifier: Apache-2.0
// What tests of kernels share: memory on the GPU and random values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "testing.h"

namespace testing {

// What fills it has arrived when the call returns: kernels run on streams that do not wait for the default
// one.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) {
    NF_CUDA(cudaMalloc(&data_, std::max<size_t>(size, 1) * sizeof(T)));  // an address even if it is empty
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    NF_CUDA(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
    wait();
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* get() const { return data_; }
  void fill(int byte) const {
    NF_CUDA(cudaMemset(data_, byte, size_ * sizeof(T)));
    wait();
  }
  void copy_from(const DeviceArray& other) const {
    NF_CUDA(cudaMemcpy(data_, other.data_, size_ * sizeof(T), cudaMemcpyDeviceToDevice));
    wait();
  }
  std::vector<T> read() const {
    std::vector<T> host(size_);
    NF_CUDA(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  static void wait() { NF_CUDA(cudaStreamSynchronize(nullptr)); }

  T* data_ = nullptr;
  size_t size_;
};

__device__ inline float hash_normal(uint64_t i, uint32_t seed) {  // the sum of four uniforms, variance 1
  float sum = 0.0f;
  for (int j = 0; j < 4; ++j) {
    uint64_t v = (i * 4 + j + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
    v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9ull;
    v = (v ^ v >> 27) * 0x94D049BB133111EBull;
    sum += float((v ^ v >> 31) >> 40) * 0x1p-24f - 0.5f;
  }
  return sum * 1.7320508f;
}

template <class T>
__global__ void fill_normal(T* values, int64_t size, uint32_t seed, float scale, float offset) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size;
       i += int64_t(gridDim.x) * blockDim.x)
    values[i] = T(hash_normal(i, seed) * scale + offset);
}

inline void check(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error(message);
}

inline bool is_hopper() {
  int num_gpus = 0, major = 0;
  if (cudaGetDeviceCount(&num_gpus) == cudaSuccess && num_gpus > 0)
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  return major == 9;
}

}  // namespace testing
