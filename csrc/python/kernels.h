#pragma once

#include <pybind11/pybind11.h>

namespace pypkg {

void bind_kernels(pybind11::module_& m);

}  // namespace pypkg
