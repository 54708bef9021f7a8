// The kernels of pypkg._native, as in csrc/python/module.cc, run by the emulation.
#include <pybind11/pybind11.h>

#include "cuda_emulation.h"
#include "kernels.h"

namespace pypkg {
void bind_faults(pybind11::module_& m);
void bind_hopper_faults(pybind11::module_& m);
}  // namespace pypkg

PYBIND11_MODULE(_emulated, m) {
  pypkg::bind_kernels(m);
  pypkg::bind_faults(m);
  pypkg::bind_hopper_faults(m);
  m.def("seed", &cuda_emulation::seed, "Restarts the sequence of scheduling decisions.");
  m.def("last_launch", &cuda_emulation::last_launch, "The operation that was launched last.");
}
