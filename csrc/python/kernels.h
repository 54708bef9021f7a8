#pragma once

#include <pybind11/pybind11.h>

namespace pypkg {

void bind_kernels(pybind11::module_& m);
// Calls these:
void bind_adamw(pybind11::module_& m);
void bind_flash_attention(pybind11::module_& m);
void bind_random_normal(pybind11::module_& m);
void bind_squared_l2_norm(pybind11::module_& m);

}  // namespace pypkg
