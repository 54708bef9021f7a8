// The kernels of pypkg._native, as in csrc/python/module.cc, run by the emulation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_emulation.h"
#include "kernels.h"

namespace pypkg {
void bind_squared_l2_norm(pybind11::module_&) {}  // has no CUDA kernel
void bind_faults(pybind11::module_& m);
void bind_hopper_faults(pybind11::module_& m);
}  // namespace pypkg

PYBIND11_MODULE(_emulated, m) {
  pypkg::bind_kernels(m);
  pypkg::bind_faults(m);
  pypkg::bind_hopper_faults(m);
  m.def("seed", &cuda_emulation::seed, "Restarts the sequence of scheduling decisions.");
  m.def("take_launches", &cuda_emulation::take_launches,
        "Operations and shapes that were launched since the last call.");
  m.def("set_shared_memory_limit", &cuda_emulation::set_shared_memory_limit,
        "Bytes that a block may have, but for the kernels of Hopper.");
}
