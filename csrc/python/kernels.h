#pragma once

#include <pybind11/pybind11.h>

namespace pypkg {

void bind_kernels(pybind11::module_& m);
void bind_adamw(pybind11::module_& m);          // one of them
void bind_random_normal(pybind11::module_& m);  // another

}  // namespace pypkg
