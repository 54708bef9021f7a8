// pypkg._native: what needs neither Paddle nor Python speed.
#include <pybind11/pybind11.h>

#include "common.h"
#include "kernels.h"
#include "matmul.h"
#include "sample_index.h"
#include "sample_reader.h"
#include "shuffle.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels for NumPy, torch and CuPy arrays; sample indices and the reading of samples.";
  pypkg::bind_kernels(m);
  pypkg::bind_sample_index(m);
  pypkg::bind_sample_reader(m);
  pypkg::bind_shuffle(m);

  m.def("set_num_threads", &pypkg::set_num_threads, py::arg("count"),
        "Threads used by the CPU kernels; 0 restores the default.");
  m.def("matmul_bfloat16_supported", &pypkg::matmul_bfloat16_supported,
        "Whether this processor has the AVX512_BF16 instructions.");
  m.def("num_threads", &pypkg::num_threads, "Threads used by the CPU kernels.");
  m.def(
      "build_info",
      [] {
        py::dict info;
#ifdef PYPKG_WITH_CUDA
        info["cuda_architectures"] = PYPKG_CUDA_ARCHITECTURES;
#else
        info["cuda_architectures"] = py::none();
#endif
        info["compiler"] = __VERSION__;
        return info;
      },
      "How the library was built: cuda_architectures (None without CUDA) and compiler.");
}
