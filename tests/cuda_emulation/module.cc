// The kernels of pypkg._native, as in csrc/python/module.cc, run by the emulation.
#include <pybind11/pybind11.h>

#include "cuda_emulation.h"
#include "kernels.h"

namespace pypkg {
void bind_faults(pybind11::module_& m);
}

PYBIND11_MODULE(_emulated, m) {
  pypkg::bind_kernels(m);
  pypkg::bind_faults(m);
  m.def("seed", &cuda_emulation::seed, "Restarts the sequence of scheduling decisions.");
}
