// Small kernels, right and wrong, that show what the emulation notices.
#include <pybind11/pybind11.h>

#include "common/cuda_launch.cuh"
#include "common/cuda_ptx.cuh"

namespace pypkg {
namespace {

constexpr int kThreads = 64;

// Every thread passes its index to the thread opposite, through shared memory.
__global__ void exchange_kernel(float* out, bool barrier) {
  auto& values = dynamic_shared<float[kThreads]>();
  values[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void async_copy_kernel(float* in, float* out, bool wait) {
  auto& values = dynamic_shared<float[kThreads]>();
  copy_async_4(&values[threadIdx.x], in + threadIdx.x, true);
  copy_async_commit();
  if (wait) copy_async_wait_all();
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void divergent_kernel(float* out, bool diverge) {
  if (diverge && threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = threadIdx.x;
}

__global__ void mixed_collectives_kernel(float* out, bool mixed) {
  float value = threadIdx.x;
  if (mixed && threadIdx.x % 2 == 1) {
    value = __shfl_sync(kFullWarp, value, 0);
  } else {
    value = __shfl_xor_sync(kFullWarp, value, 1);
  }
  out[threadIdx.x] = value;
}

// Blocks take numbers, which the threads of each write to the output in the order of their tickets.
// state: the next ticket, and 1 + the ticket whose turn has passed.
__global__ void take_turns_kernel(float* out, int* state, int first_ticket, bool wait) {
  auto& ticket = dynamic_shared<int>();
  if (threadIdx.x == 0) ticket = take_ticket(&state[0]);
  __syncthreads();
  if (threadIdx.x == 0 && ticket > first_ticket && wait) wait_for_value(&state[1], ticket);
  __syncthreads();
  add_to_memory(&out[threadIdx.x], out[threadIdx.x] + ticket);
  __syncthreads();
  if (threadIdx.x == 0) store_release(&state[1], ticket + 1);
}

}  // namespace

void bind_faults(pybind11::module_& m) {
  // Runs a kernel, with its fault or without; true if all results are right.
  m.def("run_with_fault", [](const std::string& name, bool faulty) {
    float input[kThreads], output[kThreads] = {}, expected[kThreads];
    float *in = input, *out = output;
    for (int i = 0; i < kThreads; ++i) in[i] = expected[i] = i;
    const LaunchSite site{"faults", {kThreads}};
    const size_t bytes = sizeof(float[kThreads]);
    if (name == "missing barrier") {
      std::reverse(expected, expected + kThreads);
      launch(site, exchange_kernel, dim3(1), dim3(kThreads), bytes, nullptr, out, !faulty);
    } else if (name == "missing wait") {
      launch(site, async_copy_kernel, dim3(1), dim3(kThreads), bytes, nullptr, in, out, !faulty);
    } else if (name == "shared memory too small") {
      launch(site, exchange_kernel, dim3(1), dim3(kThreads), faulty ? bytes / 2 : bytes, nullptr,
             out, true);
      std::reverse(expected, expected + kThreads);
    } else if (name == "thread missing at barrier") {
      launch(site, divergent_kernel, dim3(1), dim3(kThreads), 0, nullptr, out, faulty);
    } else if (name == "mixed collectives") {
      for (int i = 0; i < kThreads; ++i) expected[i] = i ^ 1;
      launch(site, mixed_collectives_kernel, dim3(1), dim3(kThreads), 0, nullptr, out, faulty);
    } else if (name == "no wait for the turn" || name == "turn that never comes") {
      constexpr int kBlocks = 6;
      int numbers[2] = {}, *state = numbers;
      const bool wait = !faulty || name == "turn that never comes";
      const int first_ticket = faulty && wait ? -1 : 0;  // -1: the first block waits too
      if (first_ticket < 0) state[1] = -1;
      launch(site, take_turns_kernel, dim3(kBlocks), dim3(kThreads), sizeof(int), nullptr, out,
             state, first_ticket, wait);
      float value = 0;
      for (int i = 0; i < kBlocks; ++i) value += value + i;
      std::fill_n(expected, kThreads, value);
    } else {
      throw std::invalid_argument(name);
    }
    return std::equal(out, out + kThreads, expected);
  });
}

}  // namespace pypkg
