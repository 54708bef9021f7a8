#include "arguments.h"

#include <pybind11/stl.h>

#include "dlpack.h"

namespace py = pybind11;

namespace pypkg {
namespace {

std::string dtype_of(const dlpack::DataType& type) {
  std::string kind = "unknown" + std::to_string(type.code) + "_";
  if (type.code == dlpack::kInt) kind = "int";
  if (type.code == dlpack::kUInt) kind = "uint";
  if (type.code == dlpack::kFloat) kind = "float";
  if (type.code == dlpack::kBFloat) kind = "bfloat";
  kind += std::to_string(type.bits);
  return type.lanes == 1 ? kind : kind + "x" + std::to_string(type.lanes);
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (size_t d = shape.size(); d-- > 0; step *= shape[d]) strides[d] = step;
  return strides;
}

// Whether the dimensions from `first` on are row-major without gaps; strides of size 1 are ignored.
bool is_contiguous(const Array& array, size_t first) {
  int64_t step = 1;
  for (const int64_t size : array.shape) {
    if (size == 0) return true;
  }
  for (size_t d = array.shape.size(); d-- > first; step *= array.shape[d]) {
    if (array.shape[d] > 1 && array.strides[d] != step) return false;
  }
  return true;
}

Array from_dlpack(const py::object& object, std::intptr_t stream) {
  const int device = object.attr("__dlpack_device__")().cast<py::tuple>()[0].cast<int>();
  // 1 is DLPack's number for CUDA's legacy default stream, which CUDA itself calls 0.
  const py::object capsule =
      device == dlpack::kCuda ? object.attr("__dlpack__")(py::arg("stream") = stream ? stream : 1)
                              : object.attr("__dlpack__")();
  auto* managed =
      static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  const dlpack::Tensor& tensor = managed->tensor;
  if (tensor.device.type != dlpack::kCpu && tensor.device.type != dlpack::kCuda) {
    throw py::value_error("expected an array in CPU or CUDA memory, got DLPack device type " +
                          std::to_string(tensor.device.type));
  }
  Array array;
  array.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  array.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  array.strides = tensor.strides
                      ? std::vector<int64_t>(tensor.strides, tensor.strides + tensor.ndim)
                      : contiguous_strides(array.shape);
  array.dtype = dtype_of(tensor.dtype);
  array.cuda = tensor.device.type == dlpack::kCuda;
  array.device_id = tensor.device.id;
  array.owner = capsule;  // not consumed: the capsule releases the tensor when it is destroyed
  return array;
}

Array from_tuple(const py::tuple& descriptor) {
  if (descriptor.size() != 4) {
    throw py::value_error("expected a tuple (address, shape, dtype, device), got " +
                          std::to_string(descriptor.size()) + " items");
  }
  Array array;
  array.data = reinterpret_cast<void*>(descriptor[0].cast<std::uintptr_t>());
  array.shape = descriptor[1].cast<std::vector<int64_t>>();
  array.strides = contiguous_strides(array.shape);
  array.dtype = descriptor[2].cast<std::string>();
  const auto device = descriptor[3].cast<std::string>();
  if (device != "cpu" && device != "cuda") {
    throw py::value_error("expected device 'cpu' or 'cuda', got '" + device + "'");
  }
  array.cuda = device == "cuda";
  return array;
}

std::string join(const std::vector<std::string>& parts) {
  std::string text = "[";
  for (size_t i = 0; i < parts.size(); ++i) text += (i ? ", " : "") + parts[i];
  return text + "]";
}

}  // namespace

DType dtype_named(const std::string& name, const char* kernel) {
  for (const DType each : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == dtype_name(each)) return each;
  }
  throw std::invalid_argument(std::string(kernel) + ": dtype " + name +
                              " must be float32, float16 or bfloat16");
}

void Arguments::check(bool condition, const std::string& message) const {
  if (!condition) throw py::value_error(kernel_ + ": " + message);
}

void Arguments::check_built_for_device(bool has_cuda) const {
  check(!cuda_ || has_cuda, "the arrays are on a CUDA device, but pypkg was built without CUDA");
}

Array Arguments::take(const char* name, const py::object& object) {
  Array array;
  if (py::isinstance<py::tuple>(object)) {
    array = from_tuple(object);
  } else if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    array = from_dlpack(object, stream_);
  } else {
    throw py::type_error(kernel_ + ": " + name + " must be an array with __dlpack__ or a tuple " +
                         "(address, shape, dtype, device), got " +
                         py::str(py::type::of(object)).cast<std::string>());
  }
  if (arrays_.empty()) {
    cuda_ = array.cuda;
  } else {
    const auto describe = [](const Array& a) { return std::string(a.cuda ? "cuda" : "cpu"); };
    const Array& first = arrays_.front();
    check(array.cuda == first.cuda && array.device_id == first.device_id,
          std::string(name) + " is on " + describe(array) + " device " +
              std::to_string(array.device_id) + ", expected " + describe(first) + " device " +
              std::to_string(first.device_id) + " like the first array");
  }
  arrays_.push_back(array);
  return array;
}

void Arguments::check_dtype(const char* name, const Array& array, const std::string& expected) {
  std::string wanted = expected;
  if (expected.size() == 1) {
    const auto bound = dtypes_.find(expected);
    if (bound == dtypes_.end()) {
      for (const DType type : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        if (array.dtype == dtype_name(type)) dtypes_[expected] = type;
      }
      check(dtypes_.count(expected), std::string(name) + " has dtype " + array.dtype +
                                         ", expected float32, float16 or bfloat16");
      return;
    }
    wanted = dtype_name(bound->second);
  }
  check(array.dtype == wanted,
        std::string(name) + " has dtype " + array.dtype + ", expected " + wanted);
}

void Arguments::check_shape(const char* name, const Array& array,
                            std::initializer_list<Dim> expected) {
  bool matches = array.shape.size() == expected.size();
  size_t d = 0;
  std::vector<std::string> wanted, found;
  for (const Dim& dim : expected) {
    const bool bound = dim.name.empty() || dims_.count(dim.name);
    if (!bound && matches) dims_[dim.name] = array.shape[d];
    const int64_t size = dim.name.empty() ? dim.size : bound ? dims_[dim.name] : -1;
    wanted.push_back(dim.name + (bound && !dim.name.empty() ? " = " : "") +
                     (bound ? std::to_string(size) : ""));
    matches = matches && (!bound || array.shape[d] == size);
    ++d;
  }
  for (const int64_t size : array.shape) found.push_back(std::to_string(size));
  check(matches, std::string(name) + " has shape " + join(found) + ", expected " + join(wanted));
}

Pointer Arguments::required(const char* name, const py::object& object, const char* dtype,
                            std::initializer_list<Dim> shape) {
  const Array array = take(name, object);
  check_dtype(name, array, dtype);
  check_shape(name, array, shape);
  check(is_contiguous(array, 0), std::string(name) + " must be contiguous (row-major)");
  return {array.data};
}

Pointer Arguments::optional(const char* name, const py::object& object, const char* dtype,
                            std::initializer_list<Dim> shape) {
  return object.is_none() ? Pointer{} : required(name, object, dtype, shape);
}

Pointer Arguments::strided_rows(const char* name, const py::object& object, const char* dtype,
                                std::initializer_list<Dim> shape, int64_t* stride) {
  const Array array = take(name, object);
  check_dtype(name, array, dtype);
  check_shape(name, array, shape);
  const bool one_row = array.shape[0] <= 1;
  check(is_contiguous(array, 1) && (one_row || array.strides[0] >= array.shape[1]),
        std::string(name) + " must have contiguous rows");
  *stride = one_row ? array.shape[1] : array.strides[0];
  return {array.data};
}

float* Arguments::workspace(const py::object& object, int64_t floats) {
  const Array array = take("workspace", object);
  check_dtype("workspace", array, "float32");
  check(array.shape.size() == 1 && array.shape[0] >= floats && is_contiguous(array, 0),
        "workspace must be a contiguous vector of at least " + std::to_string(floats) +
            " float32, got " + std::to_string(array.shape.empty() ? 0 : array.shape[0]));
  return static_cast<float*>(array.data);
}

}  // namespace pypkg
