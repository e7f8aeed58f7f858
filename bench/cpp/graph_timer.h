// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "kernels/common/check.h"

// Median time in us of what `enqueue()` launches on `stream`, captured in a graph: of `repeats` replays after
// two that warm up.
template <class F>
double replay_us(cudaStream_t stream, F&& enqueue, int repeats) {
  NF_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  enqueue();
  cudaGraph_t graph;
  NF_CUDA(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t exec;
  NF_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  NF_CUDA(cudaEventCreate(&begin));
  NF_CUDA(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = -2; i < repeats; ++i) {
    NF_CUDA(cudaEventRecord(begin, stream));
    NF_CUDA(cudaGraphLaunch(exec, stream));
    NF_CUDA(cudaEventRecord(end, stream));
    NF_CUDA(cudaEventSynchronize(end));
    float ms;
    NF_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) times.push_back(ms * 1e3);
  }
  NF_CUDA(cudaEventDestroy(begin));
  NF_CUDA(cudaEventDestroy(end));
  NF_CUDA(cudaGraphExecDestroy(exec));
  NF_CUDA(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}
