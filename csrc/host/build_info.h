// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

namespace nf {

// What this build contains, fixed at compile time.
struct BuildInfo {
  std::string version;             // of the package
  std::string compiler;            // that built the C++ files
  bool cuda_built;                 // are there kernels in it?
  std::string cuda_version;        // of the toolkit, "13.0"; empty without kernels
  std::vector<std::string> archs;  // "80", "90a-real" (CMake's syntax); empty without kernels
};
BuildInfo build_info();

// Ops with a CUDA backend in this build. Filled while the library loads (ops/register.h), read-only
// afterwards.
std::vector<std::string>& cuda_ops();

}  // namespace nf
