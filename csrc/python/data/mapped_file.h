// Files mapped into memory without an open descriptor, and an error that names one that is cut
// short while it is mapped.
#pragma once

#include <pybind11/pybind11.h>

namespace pypkg {

// While one lives, bytes of a mapped file that this thread reads and that are lost (the file was
// truncated, or its disk fails) are zeros, instead of a SIGBUS that ends the process.
class MappedReads {
 public:
  MappedReads();
  ~MappedReads();
  MappedReads(const MappedReads&) = delete;
  MappedReads& operator=(const MappedReads&) = delete;

  // Throws LostFileError if any thread has met lost bytes: what was read must not be used.
  void check() const;
};

void bind_mapped_file(pybind11::module_& module);

}  // namespace pypkg
