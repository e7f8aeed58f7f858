// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/library.h>

#include "host/build_info.h"

namespace nf::ops {

// Registers the CUDA backend of an op and notes it in the build info.
template <class Boxed>
void register_cuda(torch::stable::detail::StableLibrary& library, const char* op, Boxed boxed) {
  library.impl(op, boxed);
  cuda_ops().push_back(op);
}

}  // namespace nf::ops
