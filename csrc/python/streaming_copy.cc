#include "streaming_copy.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "array_checks.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace py = pybind11;

namespace pypkg {
namespace {

#if defined(__SSE2__)
constexpr size_t kLine = 64;
constexpr size_t kPage = 4096;
constexpr size_t kPages = 4;          // copied in turn, line by line
constexpr size_t kAhead = 4 * kLine;  // prefetch distance in bytes

// `to` is aligned to 16 bytes.
inline void stream_line(char* to, const char* from) {
  __m128i values[kLine / sizeof(__m128i)];
  for (size_t i = 0; i < kLine / sizeof(__m128i); ++i) {
    values[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
  }
  for (size_t i = 0; i < kLine / sizeof(__m128i); ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, values[i]);
  }
}

// Copies whole lines and returns the number of bytes. It alternates between lines of several pages,
// which uses more memory banks in parallel.
size_t stream_lines(char* to, const char* from, size_t count) {
  size_t done = 0;
  for (; count - done >= kPages * kPage; done += kPages * kPage) {
    for (size_t line = 0; line < kPage; line += kLine) {
      for (size_t page = 0; page < kPages; ++page) {
        const size_t at = done + page * kPage + line;
        __builtin_prefetch(from + at + kAhead);
        stream_line(to + at, from + at);
      }
    }
  }
  for (; count - done >= kLine; done += kLine) stream_line(to + done, from + done);
  _mm_sfence();  // orders the non-temporal stores before a flag that another process reads
  return done;
}
#endif

void streaming_copy(char* to, const char* from, size_t count) {
#if defined(__SSE2__)
  const size_t head = std::min(count, size_t(-reinterpret_cast<uintptr_t>(to) % kLine));
  std::memcpy(to, from, head);
  const size_t done = head + stream_lines(to + head, from + head, count - head);
  to += done, from += done, count -= done;
#endif
  std::memcpy(to, from, count);
}

}  // namespace

void bind_streaming_copy(py::module_& m) {
  m.def(
      "streaming_copy",
      [](py::array to, const py::array& values) {
        check_array(to, "to", py::dtype::of<uint8_t>(), 1);
        check_array(values, "values", py::dtype::of<uint8_t>(), 1);
        check(to.size() == values.size(), "to and values must have the same size");
        char* target = static_cast<char*>(to.mutable_data());
        const char* source = static_cast<const char*>(values.data());
        const size_t count = static_cast<size_t>(to.size());
        py::gil_scoped_release release;
        streaming_copy(target, source, count);
      },
      "Copies values, uint8 [n], to the array to, uint8 [n]; they do not overlap. The stores go "
      "past "
      "the caches: a store that does not reads the line first, which is a third of the traffic.",
      py::arg("to"), py::arg("values"));
}

}  // namespace pypkg
