// SPDX-License-Identifier: Apache-2.0
// The Python module nemotron_fast._C: the host layer. (The ops in the same library go through torch.ops.)
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/build_info.h"
#include "host/gemm_schedule.h"
#include "host/linear_schedule.h"
#ifdef NF_WITH_CUDA
#include "kernels/common/check.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  const nf::BuildInfo info = nf::build_info();
  py::dict d;
  d["version"] = info.version;
  d["compiler"] = info.compiler;
  d["cuda_built"] = info.cuda_built;
  d["cuda_version"] = info.cuda_built ? py::object(py::str(info.cuda_version)) : py::none();
  d["archs"] = info.archs;
  d["cuda_ops"] = nf::cuda_ops();
  return d;
}

// {"gpus": [...], "reason": None, or why there are none}
py::dict device_info() {
  py::list gpus;
  py::object reason = py::none();
#ifdef NF_WITH_CUDA
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) reason = py::str(cudaGetErrorString(status));
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    NF_CUDA(cudaGetDeviceProperties(&p, i));
    py::dict gpu;
    gpu["name"] = p.name;
    gpu["compute_capability"] = py::make_tuple(p.major, p.minor);
    gpu["num_sms"] = p.multiProcessorCount;
    gpu["memory_bytes"] = p.totalGlobalMem;
    gpu["l2_bytes"] = p.l2CacheSize;
    gpu["smem_per_cta_bytes"] = p.sharedMemPerBlockOptin;
    gpus.append(gpu);
  }
#else
  reason = py::str("this build has no CUDA");
#endif
  py::dict d;
  d["gpus"] = gpus;
  d["reason"] = reason;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What this build contains.");
  m.def("device_info", &device_info, "The GPUs that the CUDA runtime sees, or the reason why it sees none.");

  m.def("linear_workspace_bytes", &nf::linear_workspace_bytes, py::arg("num_sms"),
        "Of the workspace of a packed linear.");
  m.def("gemm_tile_tokens", &nf::gemm_tile_tokens, py::arg("num_tokens"),
        "How many tokens a full tile of the GEMM has: kernels differ by that.");
}
