// squared_l2_norm as a Python function.
#include "squared_l2_norm/squared_l2_norm.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "arguments.h"
#include "kernels.h"

namespace py = pybind11;
using py::arg;

namespace pypkg {

void bind_squared_l2_norm(py::module_& m) {
  m.def(
      "squared_l2_norm_at",
      [](const std::vector<std::uintptr_t>& arrays, const std::vector<int64_t>& sizes,
         const std::string& dtype) {
        if (sizes.size() != arrays.size()) {
          throw std::invalid_argument("squared_l2_norm: lists differ in length");
        }
        std::vector<SquaredL2NormArray> entries(arrays.size());
        for (size_t i = 0; i < arrays.size(); ++i) {
          entries[i] = {reinterpret_cast<const void*>(arrays[i]), sizes[i]};
        }
        float sum = 0.0f;
        SquaredL2Norm p;
        p.arrays = entries.data();
        p.count = static_cast<int64_t>(entries.size());
        p.dtype = dtype_named(dtype, "squared_l2_norm");
        p.out = &sum;
        squared_l2_norm_cpu(p);
        return sum;
      },
      py::call_guard<py::gil_scoped_release>(),
      "The sum of the squares of all elements of contiguous arrays in host memory, by their "
      "addresses, which are not checked, and numbers of elements; dtype: float32 or bfloat16.",
      py::kw_only(), arg("arrays"), arg("sizes"), arg("dtype"));
}

}  // namespace pypkg
