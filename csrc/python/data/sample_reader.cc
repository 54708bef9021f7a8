#include "data/sample_reader.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "array_checks.h"
#include "common/cpu_isa.h"
#include "data/mapped_file.h"

namespace py = pybind11;

namespace pypkg {
namespace {

// A float outside the range of int64 becomes -1, which is not a token id.
template <typename Token>
PYPKG_INLINE int64_t token_id(Token value) {
  if constexpr (std::is_floating_point_v<Token>) {
    return value >= -0x1p63 && value < 0x1p63 ? static_cast<int64_t>(value) : -1;
  } else {
    return static_cast<int64_t>(value);
  }
}

template <typename Token>
PYPKG_INLINE void copy(const char* tokens, int64_t count, int64_t* out) {
  const Token* typed = reinterpret_cast<const Token*>(tokens);
  for (int64_t i = 0; i < count; ++i) out[i] = token_id(typed[i]);
}

template <typename Token>
void copy_other(const char* tokens, int64_t count, int64_t* out) {
  copy<Token>(tokens, count, out);
}

using CopyTokenIds = void (*)(const char*, int64_t, int64_t*);

template <typename... Tokens>
CopyTokenIds find_copy(const py::dtype& dtype) {
  // Nearly all corpora have one of two dtypes. Only these have a version for each instruction set.
  if (dtype.equal(py::dtype::of<uint16_t>())) return cpu_version<copy<uint16_t>>();
  if (dtype.equal(py::dtype::of<int32_t>())) return cpu_version<copy<int32_t>>();
  CopyTokenIds found = nullptr;
  ((dtype.equal(py::dtype::of<Tokens>()) ? void(found = copy_other<Tokens>) : void()), ...);
  check(found != nullptr, "tokens have an unknown dtype: " + std::string(py::str(dtype)));
  return found;
}

PYPKG_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

PYPKG_INLINE void fill(int32_t* out, int64_t count, int32_t value) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

// The part of a sample in one document.
struct Piece {
  const char* tokens;
  int64_t count;
  int64_t* out;
  int32_t* starts;
  int64_t place;  // in its row
};

// Prefetches tokens of pieces before they are copied. The processor prefetches too, but not beyond
// the end of a page or of a piece.
class Ahead {
 public:
  Ahead(const std::vector<Piece>& pieces, int64_t token_bytes)
      : pieces_(pieces), token_bytes_(token_bytes) {}

  void advance(int64_t bytes) {
    constexpr int64_t kLine = 64;
    while (bytes > 0 && piece_ < pieces_.size()) {
      const int64_t size = pieces_[piece_].count * token_bytes_;
      const int64_t end = std::min(size, at_ + bytes);
      bytes -= end - at_;
      for (; at_ < end; at_ += kLine) __builtin_prefetch(pieces_[piece_].tokens + at_, 0, 2);
      if (at_ >= size) {
        ++piece_;
        at_ = 0;
      }
    }
  }

 private:
  const std::vector<Piece>& pieces_;
  int64_t token_bytes_;
  size_t piece_ = 0;
  int64_t at_ = 0;
};

// Reads the samples of one corpus in one order. It keeps references to its arrays.
class SampleReader {
 public:
  SampleReader(std::string file, py::array tokens, py::array pointers, py::array sizes,
               py::array document_index, py::array sample_index, py::array shuffle_index)
      : file_(std::move(file)),
        arrays_{std::move(tokens),         std::move(pointers),     std::move(sizes),
                std::move(document_index), std::move(sample_index), std::move(shuffle_index)},
        tokens_(static_cast<const char*>(arrays_[0].data())),
        num_bytes_(arrays_[0].nbytes()),
        token_bytes_(arrays_[0].itemsize()),
        pointers_(arrays_[1]),
        sizes_(arrays_[2]),
        num_documents_(arrays_[2].size()),
        num_positions_(arrays_[3].size()),
        num_rows_(arrays_[4].size() / 2),
        num_samples_(arrays_[5].size()) {
    check_array(arrays_[0], "tokens", arrays_[0].dtype(), 1);
    check_array(arrays_[1], "pointers", py::dtype::of<int64_t>(), 1);
    check_array(arrays_[2], "sizes", py::dtype::of<int32_t>(), 1);
    check_array(arrays_[3], "document_index", arrays_[3].dtype(), 1);
    check_array(arrays_[4], "sample_index", arrays_[3].dtype(), 2);
    check_array(arrays_[5], "shuffle_index", arrays_[5].dtype(), 1);
    check(arrays_[1].size() == arrays_[2].size(), "pointers and sizes differ in length");
    check(arrays_[4].shape(1) == 2 && num_rows_ >= 1, "sample_index must be [n, 2]");
    copy_ = find_copy<uint8_t, int8_t, int16_t, int64_t, double, float, uint32_t, uint64_t>(
        arrays_[0].dtype());
    fill_ = cpu_version<fill>();
    wide_index_ = is_int64(arrays_[3], py::dtype::of<int32_t>(), "index maps");
    wide_shuffle_ = is_int64(arrays_[5], py::dtype::of<uint32_t>(), "shuffle_index");
  }

  int64_t num_samples() const { return num_samples_; }

  void read(const py::array& samples, py::array& out, const std::optional<py::array>& rows,
            std::optional<py::array> document_starts) const {
    check_array(samples, "samples", py::dtype::of<int64_t>(), 1);
    check_array(out, "out", py::dtype::of<int64_t>(), 2);
    Wanted wanted = {static_cast<const int64_t*>(samples.data()),
                     nullptr,
                     samples.shape(0),
                     static_cast<int64_t*>(out.mutable_data()),
                     nullptr,
                     out.shape(0),
                     out.shape(1)};
    if (rows) {
      check_array(*rows, "rows", py::dtype::of<int64_t>(), 1);
      wanted.rows = static_cast<const int64_t*>(rows->data());
    }
    check((rows ? rows->shape(0) : out.shape(0)) == wanted.count,
          "samples and the rows of out differ in number");
    if (document_starts) {
      check_array(*document_starts, "document_starts", py::dtype::of<int32_t>(), 2);
      check(document_starts->shape(0) == out.shape(0) && document_starts->shape(1) == out.shape(1),
            "document_starts and out differ in shape");
      wanted.starts = static_cast<int32_t*>(document_starts->mutable_data());
    }
    py::gil_scoped_release release;
    const MappedReads reads;
    try {
      wide_index_ ? gather<int64_t>(wanted) : gather<int32_t>(wanted);
    } catch (const std::out_of_range&) {
      reads.check();  // zeros instead of lost bytes are no index
      throw;
    }
    reads.check();
  }

 private:
  struct Wanted {
    const int64_t* samples;
    const int64_t* rows;  // null: 0, 1, 2, ...
    int64_t count;
    int64_t* out;
    int32_t* starts;  // null: not wanted
    int64_t num_rows;
    int64_t length;
  };

  static bool is_int64(const py::array& array, const py::dtype& narrow, const char* name) {
    if (array.dtype().equal(narrow)) return false;
    check_array(array, name, py::dtype::of<int64_t>(), static_cast<int>(array.ndim()));
    return true;
  }

  template <typename T>
  const T* index(int which) const {
    return static_cast<const T*>(arrays_[which].data());
  }

  // The index of a sample in sample_index, or -1.
  int64_t shuffled(int64_t sample) const {
    if (sample < 0 || sample >= num_samples_) return -1;
    const int64_t found =
        wide_shuffle_ ? index<int64_t>(5)[sample] : int64_t{index<uint32_t>(5)[sample]};
    return found < num_rows_ - 1 ? found : -1;
  }

  // Finding the tokens of a sample takes four dependent reads of memory. Each step is therefore
  // done for a whole block of samples before the next step, so that their cache misses overlap.
  template <typename Index>
  void gather(const Wanted& wanted) const {
    constexpr int64_t kBlock = 16;
    std::vector<Piece> pieces;
    for (int64_t first = 0; first < wanted.count; first += kBlock) {
      const int64_t end = std::min(first + kBlock, wanted.count);
      const int64_t* samples = wanted.samples;
      for (int64_t i = first; i < end; ++i) prefetch(row_of<Index>(samples[i]));
      for (int64_t i = first; i < end; ++i) prefetch_documents<Index>(samples[i]);
      for (int64_t i = first; i < end; ++i) prefetch_sizes<Index>(samples[i]);
      pieces.clear();
      for (int64_t i = first; i < end; ++i) find_pieces<Index>(wanted, i, &pieces);
      copy_pieces(pieces);
    }
  }

  template <typename Index>
  const Index* row_of(int64_t number) const {
    const int64_t sample = shuffled(number);
    if (sample < 0) fail(number, "no such sample");
    return index<Index>(4) + 2 * sample;
  }

  template <typename Index>
  void prefetch_documents(int64_t number) const {
    const Index* row = row_of<Index>(number);
    if (row[0] < 0 || row[2] < row[0] || row[2] >= num_positions_) fail(number, "no such position");
    constexpr int64_t kPerLine = 64 / sizeof(Index);
    for (int64_t at = row[0]; at <= row[2]; at += kPerLine) prefetch(index<Index>(3) + at);
  }

  template <typename Index>
  void prefetch_sizes(int64_t number) const {
    const Index* row = row_of<Index>(number);
    for (int64_t at = row[0]; at <= row[2]; ++at) {
      const int64_t document = index<Index>(3)[at];
      if (document < 0 || document >= num_documents_) fail(number, "no such document");
      pointers_.prefetch(document);
      sizes_.prefetch(document);
    }
  }

  template <typename Index>
  void find_pieces(const Wanted& wanted, int64_t i, std::vector<Piece>* pieces) const {
    const int64_t number = wanted.samples[i];
    const int64_t out_row = wanted.rows ? wanted.rows[i] : i;
    if (out_row < 0 || out_row >= wanted.num_rows) fail(number, "no such row of out");
    const int64_t begin_of_row = out_row * wanted.length;
    const Index* row = row_of<Index>(number);
    int64_t done = 0;
    for (int64_t at = row[0]; at <= row[2]; ++at) {
      const int64_t document = index<Index>(3)[at];
      const int64_t size = sizes_[document];
      const int64_t begin = at == row[0] ? row[1] : 0;
      const int64_t end = at == row[2] ? int64_t{row[3]} + 1 : size;
      const int64_t count = end - begin;
      const int64_t first_byte = pointers_[document] + begin * token_bytes_;
      if (begin < 0 || end > size || count < 0 || done + count > wanted.length || first_byte < 0 ||
          first_byte + count * token_bytes_ > num_bytes_) {
        fail(number, "sample_index does not fit the documents");
      }
      if (count == 0) continue;
      int32_t* starts = wanted.starts ? wanted.starts + begin_of_row + done : nullptr;
      pieces->push_back(
          {tokens_ + first_byte, count, wanted.out + begin_of_row + done, starts, done});
      done += count;
    }
    if (done != wanted.length) fail(number, "sample_index does not fit seq_length");
  }

  void copy_pieces(const std::vector<Piece>& pieces) const {
    constexpr int64_t kAheadBytes = 4096, kChunk = 64;
    Ahead ahead(pieces, token_bytes_);
    ahead.advance(kAheadBytes);
    for (const Piece& piece : pieces) {
      for (int64_t done = 0; done < piece.count; done += kChunk) {
        const int64_t count = std::min(kChunk, piece.count - done);
        ahead.advance(count * token_bytes_);
        copy_(piece.tokens + done * token_bytes_, count, piece.out + done);
      }
      if (piece.starts) fill_(piece.starts, piece.count, static_cast<int32_t>(piece.place));
    }
  }

  [[noreturn]] void fail(int64_t sample, const char* reason) const {
    throw std::out_of_range(file_ + ", sample " + std::to_string(sample) + ": " + reason);
  }

  std::string file_;
  py::array arrays_[6];  // in the order of the constructor's arguments
  const char* tokens_;
  int64_t num_bytes_;
  int64_t token_bytes_;
  Unaligned<int64_t> pointers_;  // byte at which each document begins
  Unaligned<int32_t> sizes_;     // tokens of each document
  int64_t num_documents_;
  int64_t num_positions_;
  int64_t num_rows_;  // of sample_index: one more than it has samples
  int64_t num_samples_;
  CopyTokenIds copy_;
  void (*fill_)(int32_t*, int64_t, int32_t);
  bool wide_index_;
  bool wide_shuffle_;
};

}  // namespace

void bind_sample_reader(py::module_& module) {
  py::class_<SampleReader>(module, "SampleReader",
                           "The token ids of the samples of one corpus in one order.")
      .def(
          py::init<std::string, py::array, py::array, py::array, py::array, py::array, py::array>(),
          py::arg("file"), py::arg("tokens"), py::arg("pointers"), py::arg("sizes"),
          py::arg("document_index"), py::arg("sample_index"), py::arg("shuffle_index"),
          R"doc(Keeps the arrays, which must not change.

Args:
    file: what messages call the corpus.
    tokens: [tokens], of any of the ten dtypes of a .bin file.
    pointers: int64 [documents], byte at which each document begins in tokens.
    sizes: int32 [documents].
    document_index, sample_index: the index maps, both int32 or both int64.
    shuffle_index: uint32 or int64 [samples], rows of sample_index.)doc")
      .def("__len__", &SampleReader::num_samples)
      .def("read", &SampleReader::read, py::arg("samples"), py::arg("out").noconvert(),
           py::arg("rows") = py::none(), py::arg("document_starts") = py::none(),
           R"doc(Copies the token ids of samples into rows of out, without the GIL.

Args:
    samples: int64 [n], which samples.
    out: int64 [batch, seq_length + 1]; the rows that are named are overwritten.
    rows: int64 [n], the row of out for each sample; None for 0, 1, 2, ...
    document_starts: int32, the shape of out, overwritten alike: for each token, the place in its
        row of the first token of its document.

Raises:
    IndexError: a sample does not exist, or the maps do not fit the documents; names the file and
        the sample.
    UserError: a mapped file was truncated, or its disk fails; names the file.)doc");
}

}  // namespace pypkg
