// Kernel arguments from arrays of NumPy, torch, CuPy and others: DLPack import, checks, dispatch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "common/common.h"

// The CPU and the CUDA version of a kernel, for Arguments::run.
#ifdef PYPKG_WITH_CUDA
#define PYPKG_KERNEL(name) name##_cpu, name##_cuda
#else
#define PYPKG_KERNEL(name) name##_cpu, nullptr
#endif

namespace pypkg {

// An array of the caller: anything with __dlpack__ and __dlpack_device__, or the tuple
// (address, shape, dtype name, "cpu" or "cuda") of a contiguous one, which is how NumPy, that has
// no bfloat16, passes uint16 storage as "bfloat16".
struct Array {
  void* data = nullptr;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  std::string dtype;
  bool cuda = false;
  int64_t device_id = 0;
  pybind11::object owner;  // keeps data alive
};

// The dtype of a name: "float32", "float16" or "bfloat16"; others raise ValueError for `kernel`.
DType dtype_named(const std::string& name, const char* kernel);

// A data pointer whose element type the checks have established.
struct Pointer {
  void* data = nullptr;
  template <class T>
  operator T*() const {
    return static_cast<T*>(data);
  }
};

// One dimension of an expected shape: a size, or a name that means the same size wherever it occurs
// in the call.
struct Dim {
  Dim(const char* name) : name(name) {}
  Dim(int64_t size) : size(size) {}
  std::string name;
  int64_t size = -1;
};

// The array arguments of one call. Every array must have the expected shape and dtype, be row-major
// and contiguous, and be on the device of the first array; otherwise ValueError gives the expected
// and the actual value. A dtype of one capital letter is any of float32, float16 and bfloat16, and
// the same wherever the letter occurs; other names are literal.
class Arguments {
 public:
  Arguments(std::string kernel, std::intptr_t stream)
      : kernel_(std::move(kernel)), stream_(stream) {}

  Pointer required(const char* name, const pybind11::object& object, const char* dtype,
                   std::initializer_list<Dim> shape);
  // None gives null.
  Pointer optional(const char* name, const pybind11::object& object, const char* dtype,
                   std::initializer_list<Dim> shape);
  // A [rows, cols] matrix whose rows may be strided, such as half of a wider matrix.
  Pointer strided_rows(const char* name, const pybind11::object& object, const char* dtype,
                       std::initializer_list<Dim> shape, int64_t* stride);
  // At least `floats` float32.
  float* workspace(const pybind11::object& object, int64_t floats);

  int64_t operator[](const std::string& dim) const { return dims_.at(dim); }
  DType dtype(const std::string& letter) const { return dtypes_.at(letter); }
  // Raises ValueError unless the condition holds.
  void check(bool condition, const std::string& message) const;

  // Calls a function of sizes, in the version for the device of the arrays.
  template <class... Sizes>
  int64_t evaluate(int64_t (*cpu)(Sizes...), std::common_type_t<int64_t (*)(Sizes...)> cuda,
                   std::common_type_t<Sizes>... sizes) const {
    check_built_for_device(cuda != nullptr);
    return cuda_ ? cuda(sizes...) : cpu(sizes...);
  }

  // Runs the kernel on the device of the arrays, without the GIL.
  template <class Params>
  void run(const Params& params, void (*cpu)(const Params&),
           std::common_type_t<void (*)(const Params&, Stream)> cuda) const {
    check_built_for_device(cuda != nullptr);
    pybind11::gil_scoped_release release;
    if (cuda_) {
      cuda(params, reinterpret_cast<Stream>(stream_));
    } else {
      cpu(params);
    }
  }

 private:
  void check_built_for_device(bool has_cuda) const;
  Array take(const char* name, const pybind11::object& object);
  void check_dtype(const char* name, const Array& array, const std::string& expected);
  void check_shape(const char* name, const Array& array, std::initializer_list<Dim> expected);

  std::string kernel_;
  std::intptr_t stream_;
  std::map<std::string, int64_t> dims_;
  std::map<std::string, DType> dtypes_;
  std::vector<Array> arrays_;
  bool cuda_ = false;
};

}  // namespace pypkg
