// pypkg._native: compiled functions that do not need Paddle.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/common.h"
#include "common/cpu_isa.h"
#include "data/mapped_file.h"
#include "data/sample_index.h"
#include "data/sample_reader.h"
#include "data/shuffle.h"
#include "kernels.h"
#include "streaming_copy.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels for NumPy, torch and CuPy arrays; sample indices, reading of samples, copies.";
  pypkg::bind_kernels(m);
  pypkg::bind_mapped_file(m);
  pypkg::bind_sample_index(m);
  pypkg::bind_sample_reader(m);
  pypkg::bind_shuffle(m);
  pypkg::bind_streaming_copy(m);

  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const pypkg::CpuIsaError& error) {
      py::set_error(py::module_::import("pypkg.errors").attr("UserError"), error.what());
    }
  });
  m.def(
      "cpu_isa", [] { return pypkg::cpu_isa_name(pypkg::cpu_isa()); },
      "The instruction set whose version of the CPU kernels runs: that of set_cpu_isa, else of the "
      "environment variable PYPKG_CPU_ISA, else the widest that this processor has.");
  m.def("cpu_isas", &pypkg::cpu_isa_names,
        "The instruction sets with a version that this processor runs, the widest last.");
  m.def("set_cpu_isa", &pypkg::set_cpu_isa, py::arg("name"),
        "Chooses the version of the CPU kernels; an empty name restores the default.");
  m.def("set_num_threads", &pypkg::set_num_threads, py::arg("count"),
        "Threads used by the CPU kernels; 0 restores the default.");
  m.def("matmul_bfloat16_supported", &pypkg::cpu_has_bfloat16,
        "Whether the processor and the version in use have the AVX512_BF16 instructions.");
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
