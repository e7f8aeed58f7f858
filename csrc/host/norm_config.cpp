// SPDX-License-Identifier: Apache-2.0
#include "host/norm_config.h"

#include "host/check.h"

namespace nf {
namespace {

constexpr int kElementsPerVec = 8;  // 16 bytes of a 2-byte type
constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

// Up to here a row gets more threads rather than more vectors per thread (H200, E=8192, T=64: 512 x 2 take
// 2.8 us, 256 x 4 take 3.4). Three such CTAs share an SM, so that one loads while another reduces.
constexpr int kPreferredThreads = 512;

}  // namespace

NormConfig pick_norm_config(int dim) {
  NF_CHECK(dim > 0 && dim % kElementsPerVec == 0, "E=" + std::to_string(dim));
  const int vecs = dim / kElementsPerVec;
  for (int max_threads : {kPreferredThreads, kMaxThreads}) {
    for (int vecs_per_thread : {1, 2, 4}) {
      const int lanes = (vecs + vecs_per_thread - 1) / vecs_per_thread;
      const int threads = (lanes + kWarp - 1) / kWarp * kWarp;
      if (threads <= max_threads) return {threads, vecs_per_thread};
    }
  }
  throw Error("pick_norm_config: E=" + std::to_string(dim) +
              " does not fit in the registers of one CTA, want E <= 32768");
}

std::string to_string(const NormConfig& config) {
  return std::to_string(config.threads) + " threads x " + std::to_string(config.vecs_per_thread) + " vectors";
}

}  // namespace nf
