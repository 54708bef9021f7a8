#include "data/sample_index.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "array_checks.h"
#include "common/cpu_isa.h"

namespace py = pybind11;

namespace pypkg {
namespace {

// Calls function(int32_t()) or function(int64_t()) for an array of either type.
template <typename Function>
void dispatch_index_type(const py::array& array, Function function) {
  if (array.dtype().equal(py::dtype::of<int32_t>())) return function(int32_t());
  check(array.dtype().equal(py::dtype::of<int64_t>()), "index maps must be int32 or int64");
  function(int64_t());
}

template <typename Index>
void build_sample_index(Unaligned<int32_t> sizes, int64_t num_documents,
                        Unaligned<Index> document_index, int64_t num_positions, int64_t seq_length,
                        Index* rows, int64_t num_rows) {
  constexpr int64_t kAhead = 64;  // documents; their sizes lie anywhere in memory
  int64_t position = 0;
  int64_t offset = 0;
  rows[0] = 0;
  rows[1] = 0;
  for (int64_t i = 1; i < num_rows; ++i) {
    offset += seq_length;
    while (true) {
      if (position >= num_positions)
        throw std::out_of_range("the documents end before the samples");
      const int64_t document = document_index[position];
      if (document < 0 || document >= num_documents) throw std::out_of_range("no such document");
      if (position + kAhead < num_positions) sizes.prefetch(document_index[position + kAhead]);
      const int64_t size = sizes[document];
      if (offset < size) break;
      offset -= size;
      ++position;
    }
    rows[2 * i] = static_cast<Index>(position);
    rows[2 * i + 1] = static_cast<Index>(offset);
  }
}

void build_sample_index_array(const py::array& sizes, const py::array& document_index,
                              int64_t seq_length, py::array& sample_index) {
  check_array(sizes, "sizes", py::dtype::of<int32_t>(), 1);
  check_array(document_index, "document_index", document_index.dtype(), 1);
  check_array(sample_index, "sample_index", document_index.dtype(), 2);
  check(sample_index.shape(1) == 2 && sample_index.shape(0) >= 1, "sample_index must be [n, 2]");
  check(seq_length >= 1, "seq_length must be at least 1");
  dispatch_index_type(document_index, [&](auto type) {
    using Index = decltype(type);
    Index* rows = static_cast<Index*>(sample_index.mutable_data());
    py::gil_scoped_release release;
    build_sample_index<Index>(Unaligned<int32_t>(sizes), sizes.shape(0),
                              Unaligned<Index>(document_index), document_index.shape(0), seq_length,
                              rows, sample_index.shape(0));
  });
}

// Greedy: step i takes the dataset that lags most behind its share, weights[d] * max(i, 1) -
// taken[d]; the first one if several are equal. There are two passes over the datasets: one finds
// the maximum with vector instructions, the other its index. `weights` and `taken` are padded to
// whole vectors with datasets that are never chosen.
constexpr int64_t kLanes = 8;

PYPKG_INLINE void blend(const double* weights, double* taken, int64_t num_padded, int64_t size,
                        double* lags, int16_t* dataset, int64_t* sample) {
  for (int64_t i = 0; i < size; ++i) {
    const double steps = static_cast<double>(std::max<int64_t>(i, 1));
    double largest[kLanes];
    std::fill_n(largest, kLanes, -std::numeric_limits<double>::infinity());
    for (int64_t d = 0; d < num_padded; d += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) {
        const double lag = weights[d + k] * steps - taken[d + k];
        lags[d + k] = lag;
        largest[k] = lag > largest[k] ? lag : largest[k];
      }
    }
    const double most = *std::max_element(largest, largest + kLanes);
    const int64_t chosen = std::find(lags, lags + num_padded, most) - lags;
    dataset[i] = static_cast<int16_t>(chosen);
    sample[i] = static_cast<int64_t>(taken[chosen]);
    taken[chosen] += 1;
  }
}

py::tuple build_blending_indices(py::array_t<double, py::array::c_style> weights, int64_t size) {
  const int64_t num_datasets = weights.size();
  check(weights.ndim() == 1 && num_datasets >= 1, "weights must be [datasets], at least one");
  check(num_datasets <= std::numeric_limits<int16_t>::max(), "more than 32767 datasets");
  check(size >= 0, "size must not be negative");
  const double* given = weights.data();
  check(std::all_of(given, given + num_datasets, [](double w) { return std::isfinite(w); }),
        "weights must be finite");
  const int64_t num_padded = (num_datasets + kLanes - 1) / kLanes * kLanes;
  std::vector<double> padded(num_padded, 0.0), lags(num_padded);
  std::vector<double> taken(num_padded, std::numeric_limits<double>::infinity());
  std::copy_n(given, num_datasets, padded.begin());
  std::fill_n(taken.begin(), num_datasets, 0.0);
  py::array_t<int16_t> dataset_index(size);
  py::array_t<int64_t> dataset_sample_index(size);
  int16_t* dataset = dataset_index.mutable_data();
  int64_t* sample = dataset_sample_index.mutable_data();
  {
    const auto run = cpu_version<blend>();
    py::gil_scoped_release release;
    run(padded.data(), taken.data(), num_padded, size, lags.data(), dataset, sample);
  }
  return py::make_tuple(dataset_index, dataset_sample_index);
}

}  // namespace

void bind_sample_index(py::module_& module) {
  module.def("build_sample_index", &build_sample_index_array, py::arg("sizes"),
             py::arg("document_index"), py::arg("seq_length"), py::arg("sample_index").noconvert(),
             R"doc(Fills sample_index: the beginning of every seq_length-th token of the documents.

Args:
    sizes: int32 [documents], tokens of each document.
    document_index: int32 or int64 [positions], the order of reading.
    seq_length: tokens between two rows.
    sample_index: [num_samples + 1, 2] of the same dtype, overwritten: position, token in it.

Raises:
    IndexError: the documents end before num_samples, or one of them does not exist.)doc");
  module.def("build_blending_indices", &build_blending_indices, py::arg("weights"), py::arg("size"),
             R"doc(For each of size steps, which dataset gives a sample and which of its samples.

Args:
    weights: float64 [datasets], finite, adding up to 1.

Returns:
    int16 [size] and int64 [size].)doc");
}

}  // namespace pypkg
