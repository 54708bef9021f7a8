// Copying the tokens of training samples from a memory-mapped corpus into batches.
//
// Sample i of a dataset is sample shuffle_index[i] of the maps in sample_index.h.
#pragma once

#include <pybind11/pybind11.h>

namespace pypkg {

// Adds the class SampleReader to the module.
void bind_sample_reader(pybind11::module_& module);

}  // namespace pypkg
