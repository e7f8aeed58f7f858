// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>

namespace nf {

// A broken contract or a failed CUDA call. Python sees it as RuntimeError.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace nf

// The message prints its own condition, so that text and test cannot disagree; `detail` says what was found.
#define NF_CHECK(condition, detail)                                                          \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      throw ::nf::Error(std::string(__func__) + ": want " #condition ", found " + (detail)); \
    }                                                                                        \
  } while (false)
