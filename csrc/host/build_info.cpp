// SPDX-License-Identifier: Apache-2.0
#include "host/build_info.h"

#include <sstream>

#ifdef NF_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace nf {

BuildInfo build_info() {
  BuildInfo info{
      .version = NF_VERSION, .compiler = __VERSION__, .cuda_built = false, .cuda_version = "", .archs = {}};
#ifdef NF_WITH_CUDA
  info.cuda_built = true;
  info.cuda_version =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  std::istringstream archs(NF_CUDA_ARCHS);
  for (std::string arch; std::getline(archs, arch, ',');) info.archs.push_back(arch);
#endif
  return info;
}

std::vector<std::string>& cuda_ops() {
  static std::vector<std::string> ops;
  return ops;
}

}  // namespace nf
