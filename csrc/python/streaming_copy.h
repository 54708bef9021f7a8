// Copies with non-temporal stores, which bypass the caches.
#pragma once

#include <pybind11/pybind11.h>

namespace pypkg {

// Adds streaming_copy to the module.
void bind_streaming_copy(pybind11::module_& module);

}  // namespace pypkg
