// Index maps that define the tokens of each training sample.
//
// They are Megatron-LM's, which PaddleNLP uses too:
//   document_index  [positions]           the documents in the order in which they are read
//   sample_index    [num_samples + 1, 2]  where each sample begins: position in document_index, and
//                                         token in that document
// Sample i runs from row i to row i + 1, both ends included: seq_length + 1 tokens, of which the
// last is the first of its neighbour. Both maps are int32 or both int64.
#pragma once

#include <pybind11/pybind11.h>

namespace pypkg {

// Adds build_sample_index and build_blending_indices to the module.
void bind_sample_index(pybind11::module_& module);

}  // namespace pypkg
