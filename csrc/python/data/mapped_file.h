// Memory-mapped files without an open descriptor, and an error that names a file that is truncated
// while it is mapped.
#pragma once

#include <pybind11/pybind11.h>

namespace pypkg {

// During the lifetime of an object, this thread reads zeros for bytes of a mapped file that are
// lost (the file was truncated, or its disk fails), instead of getting a SIGBUS that ends the
// process.
class MappedReads {
 public:
  MappedReads();
  ~MappedReads();
  MappedReads(const MappedReads&) = delete;
  MappedReads& operator=(const MappedReads&) = delete;

  // Throws LostFileError if any thread has read lost bytes; the data must not be used then.
  void check() const;
};

void bind_mapped_file(pybind11::module_& module);

}  // namespace pypkg
