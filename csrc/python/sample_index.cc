#include "sample_index.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace py = pybind11;

namespace pypkg {
namespace {

// Arrays inside a memory-mapped .idx file start at offset 34 and are not aligned.
template <typename T>
class Unaligned {
 public:
  explicit Unaligned(const py::array& array) : bytes_(static_cast<const char*>(array.data())) {}
  T operator[](int64_t i) const {
    T value;
    std::memcpy(&value, bytes_ + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }

 private:
  const char* bytes_;
};

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_array(const py::array& array, const char* name, const py::dtype& dtype, int ndim) {
  check(array.dtype().is(dtype) || array.dtype().equal(dtype),
        std::string(name) + " has the wrong dtype: " + std::string(py::str(array.dtype())));
  check(array.ndim() == ndim && (array.flags() & py::array::c_style),
        std::string(name) + " must be contiguous, of " + std::to_string(ndim) + " dimension(s)");
}

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

// Greedy: at step i the dataset that lags its share the most, weights[d] * max(i, 1) - taken[d];
// the first of equals.
py::tuple build_blending_indices(py::array_t<double, py::array::c_style> weights, int64_t size) {
  const int64_t num_datasets = weights.size();
  check(weights.ndim() == 1 && num_datasets >= 1, "weights must be [datasets], at least one");
  check(num_datasets <= std::numeric_limits<int16_t>::max(), "more than 32767 datasets");
  check(size >= 0, "size must not be negative");
  py::array_t<int16_t> dataset_index(size);
  py::array_t<int64_t> dataset_sample_index(size);
  const double* weight = weights.data();
  int16_t* dataset = dataset_index.mutable_data();
  int64_t* sample = dataset_sample_index.mutable_data();
  {
    py::gil_scoped_release release;
    std::vector<int64_t> taken(num_datasets, 0);
    for (int64_t i = 0; i < size; ++i) {
      const double steps = static_cast<double>(std::max<int64_t>(i, 1));
      int64_t chosen = 0;
      double largest = weight[0] * steps - static_cast<double>(taken[0]);
      for (int64_t d = 1; d < num_datasets; ++d) {
        const double lag = weight[d] * steps - static_cast<double>(taken[d]);
        if (lag > largest) {
          largest = lag;
          chosen = d;
        }
      }
      dataset[i] = static_cast<int16_t>(chosen);
      sample[i] = taken[chosen]++;
    }
  }
  return py::make_tuple(dataset_index, dataset_sample_index);
}

// A float that no int64 holds becomes -1, which is no token id either.
template <typename Token>
int64_t token_id(Token value) {
  if constexpr (std::is_floating_point_v<Token>) {
    return value >= -0x1p63 && value < 0x1p63 ? static_cast<int64_t>(value) : -1;
  } else {
    return static_cast<int64_t>(value);
  }
}

template <typename Token>
void copy_token_ids(const char* tokens, int64_t count, int64_t* out) {
  const Token* typed = reinterpret_cast<const Token*>(tokens);
  for (int64_t i = 0; i < count; ++i) out[i] = token_id(typed[i]);
}

using CopyTokenIds = void (*)(const char*, int64_t, int64_t*);

template <typename... Tokens>
CopyTokenIds find_copy(const py::dtype& dtype) {
  CopyTokenIds found = nullptr;
  ((dtype.equal(py::dtype::of<Tokens>()) ? void(found = copy_token_ids<Tokens>) : void()), ...);
  check(found != nullptr, "tokens have an unknown dtype: " + std::string(py::str(dtype)));
  return found;
}

struct Corpus {
  const char* tokens;  // of token_bytes each
  int64_t num_bytes;
  int64_t token_bytes;
  CopyTokenIds copy;
  Unaligned<int64_t> pointers;  // byte at which each document begins
  Unaligned<int32_t> sizes;     // tokens of each document
  int64_t num_documents;
};

template <typename Index>
void gather_samples(const Corpus& corpus, const Index* document_index, int64_t num_positions,
                    const Index* sample_index, int64_t num_samples, const int64_t* samples,
                    int64_t batch, int64_t length, int64_t* out) {
  for (int64_t b = 0; b < batch; ++b, out += length) {
    const int64_t sample = samples[b];
    if (sample < 0 || sample >= num_samples) throw std::out_of_range("no such sample");
    const Index* row = sample_index + 2 * sample;
    int64_t done = 0;
    for (int64_t position = row[0]; position <= row[2]; ++position) {
      if (position < 0 || position >= num_positions) throw std::out_of_range("no such position");
      const int64_t document = document_index[position];
      if (document < 0 || document >= corpus.num_documents) {
        throw std::out_of_range("no such document");
      }
      const int64_t size = corpus.sizes[document];
      const int64_t begin = position == row[0] ? row[1] : 0;
      const int64_t end = position == row[2] ? int64_t{row[3]} + 1 : size;
      const int64_t first_byte = corpus.pointers[document] + begin * corpus.token_bytes;
      if (begin < 0 || end > size || end < begin || done + end - begin > length || first_byte < 0 ||
          first_byte + (end - begin) * corpus.token_bytes > corpus.num_bytes) {
        throw std::out_of_range("sample_index does not fit the documents");
      }
      corpus.copy(corpus.tokens + first_byte, end - begin, out + done);
      done += end - begin;
    }
    if (done != length) throw std::out_of_range("sample_index does not fit seq_length");
  }
}

void gather_samples_array(const py::array& tokens, const py::array& pointers,
                          const py::array& sizes, const py::array& document_index,
                          const py::array& sample_index, const py::array& samples, py::array& out) {
  check_array(tokens, "tokens", tokens.dtype(), 1);
  check_array(pointers, "pointers", py::dtype::of<int64_t>(), 1);
  check_array(sizes, "sizes", py::dtype::of<int32_t>(), 1);
  check_array(document_index, "document_index", document_index.dtype(), 1);
  check_array(sample_index, "sample_index", document_index.dtype(), 2);
  check_array(samples, "samples", py::dtype::of<int64_t>(), 1);
  check_array(out, "out", py::dtype::of<int64_t>(), 2);
  check(pointers.shape(0) == sizes.shape(0), "pointers and sizes differ in length");
  check(sample_index.shape(1) == 2 && sample_index.shape(0) >= 1, "sample_index must be [n, 2]");
  check(out.shape(0) == samples.shape(0), "out and samples differ in length");
  const Corpus corpus = {static_cast<const char*>(tokens.data()),
                         tokens.nbytes(),
                         tokens.itemsize(),
                         find_copy<uint8_t, int8_t, int16_t, int32_t, int64_t, double, float,
                                   uint16_t, uint32_t, uint64_t>(tokens.dtype()),
                         Unaligned<int64_t>(pointers),
                         Unaligned<int32_t>(sizes),
                         sizes.shape(0)};
  const auto* wanted = static_cast<const int64_t*>(samples.data());
  auto* ids = static_cast<int64_t*>(out.mutable_data());
  dispatch_index_type(document_index, [&](auto type) {
    using Index = decltype(type);
    const auto* documents = static_cast<const Index*>(document_index.data());
    const auto* rows = static_cast<const Index*>(sample_index.data());
    py::gil_scoped_release release;
    gather_samples<Index>(corpus, documents, document_index.shape(0), rows,
                          sample_index.shape(0) - 1, wanted, samples.shape(0), out.shape(1), ids);
  });
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
    weights: float64 [datasets], adding up to 1.

Returns:
    int16 [size] and int64 [size].)doc");
  module.def("gather_samples", &gather_samples_array, py::arg("tokens"), py::arg("pointers"),
             py::arg("sizes"), py::arg("document_index"), py::arg("sample_index"),
             py::arg("samples"), py::arg("out").noconvert(),
             R"doc(Copies the token ids of samples into the rows of out.

Args:
    tokens: [tokens], of any of the ten dtypes of a .bin file.
    pointers: int64 [documents], byte at which each document begins in tokens.
    sizes: int32 [documents].
    document_index, sample_index: the index maps, both int32 or both int64.
    samples: int64 [batch], rows of sample_index.
    out: int64 [batch, seq_length + 1], overwritten.

Raises:
    IndexError: a sample does not exist, or the maps do not fit the documents.)doc");
}

}  // namespace pypkg
