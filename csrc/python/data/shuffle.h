// The shuffle of numpy.random.RandomState, bit for bit, with prefetched items.
#pragma once

#include <pybind11/pybind11.h>

namespace pypkg {

// Adds shuffle and shuffle_partners to the module.
void bind_shuffle(pybind11::module_& module);

}  // namespace pypkg
