// SPDX-License-Identifier: Apache-2.0
#include "host/norm_config.h"

#include "host/check.h"

namespace nf {
namespace {

constexpr int kElementsPerVec = 8;  // 16 bytes of a 2-byte type
constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

// Threads per row are more than these only where 4 vectors each do not hold it. Few rows: what counts is how
// long one takes. Many: what each thread does once a row. (To e4m3, E=8192, H100: 128 rows take 2.7 us with
// 512 x 2 and 3.6 with 256 x 4, 512 and 2048 rows, not in the L2, 8.0 and 23.6, and 6.9 and 21.6.)
constexpr int kFewRowsThreads = 512, kManyRowsThreads = 256;
constexpr int64_t kFewRows = 256;

}  // namespace

NormConfig pick_norm_config(int dim, int64_t num_tokens) {
  NF_CHECK(dim > 0 && dim % kElementsPerVec == 0, "E=" + std::to_string(dim));
  const int vecs = dim / kElementsPerVec;
  for (int max_threads :
       {num_tokens > kFewRows ? kManyRowsThreads : kFewRowsThreads, kFewRowsThreads, kMaxThreads}) {
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
