// Checks of NumPy arrays before C++ indexes them, and access to unaligned arrays.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pypkg {

// Arrays inside a memory-mapped .idx file start at offset 34 and are not aligned.
template <typename T>
class Unaligned {
 public:
  explicit Unaligned(const pybind11::array& array)
      : bytes_(static_cast<const char*>(array.data())) {}
  T operator[](int64_t i) const {
    T value;
    std::memcpy(&value, bytes_ + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  // Prefetches element i.
  void prefetch(int64_t i) const {
    __builtin_prefetch(bytes_ + i * static_cast<int64_t>(sizeof(T)), 0, 3);
  }

 private:
  const char* bytes_;
};

// ValueError unless the condition holds.
inline void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void check_array(const pybind11::array& array, const char* name,
                        const pybind11::dtype& dtype, int ndim) {
  if (!array.dtype().is(dtype) && !array.dtype().equal(dtype)) {
    throw std::invalid_argument(
        std::string(name) + " has the wrong dtype: " + std::string(pybind11::str(array.dtype())));
  }
  if (array.ndim() != ndim || !(array.flags() & pybind11::array::c_style)) {
    throw std::invalid_argument(std::string(name) + " must be contiguous, of " +
                                std::to_string(ndim) + " dimension(s)");
  }
}

}  // namespace pypkg
