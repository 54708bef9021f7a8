// Shared by all operators: checks whose messages give the expected and the actual value, and the
// choice between the CPU and the CUDA version of a kernel.
#pragma once

#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "common/common.h"
#include "paddle/phi/api/all.h"

namespace pypkg {

using Shape = std::vector<int64_t>;
using OptionalTensor = paddle::optional<paddle::Tensor>;
using OptionalShape = paddle::optional<Shape>;
using OptionalDataType = paddle::optional<paddle::DataType>;

inline std::string to_string(const Shape& shape) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << "]";
  return out.str();
}

inline int64_t num_elements(const Shape& shape) {
  int64_t product = 1;
  for (int64_t size : shape) product *= size;
  return product;
}

// Throws an error that Python receives as ValueError; its message is the concatenated parts.
template <typename... Parts>
[[noreturn]] void reject(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  PADDLE_THROW(common::errors::InvalidArgument("%s", message.str()));
}

inline void check_shape(const char* name, const paddle::Tensor& tensor, const Shape& expected) {
  if (tensor.shape() == expected) return;
  reject(name, " must have shape ", to_string(expected), ", got ", to_string(tensor.shape()));
}

inline void check_rank(const char* name, const paddle::Tensor& tensor, size_t expected) {
  if (tensor.shape().size() == expected) return;
  reject(name, " must have ", expected, " dimensions, got shape ", to_string(tensor.shape()));
}

inline void check_dtype(const char* name, const paddle::Tensor& tensor, paddle::DataType expected) {
  if (tensor.dtype() == expected) return;
  reject(name, " must be ", expected, ", got ", tensor.dtype());
}

inline void check_place(const char* name, const paddle::Tensor& tensor,
                        const paddle::Tensor& first) {
  if (tensor.place() == first.place()) return;
  reject(name, " must be on ", first.place(), ", got ", tensor.place());
}

// The kernels' dtype of a tensor.
inline DType kernel_dtype(const char* name, const paddle::Tensor& tensor) {
  switch (tensor.dtype()) {
    case paddle::DataType::FLOAT32: return DType::kFloat32;
    case paddle::DataType::FLOAT16: return DType::kFloat16;
    case paddle::DataType::BFLOAT16: return DType::kBFloat16;
    default: reject(name, " must be float32, float16 or bfloat16, got ", tensor.dtype());
  }
}

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->data<T>() : nullptr;
}

inline const void* raw(const paddle::Tensor& tensor) { return tensor.data(); }
inline void* raw(paddle::Tensor* tensor) { return tensor->data(); }

inline paddle::Tensor empty(const Shape& shape, paddle::DataType dtype,
                            const paddle::Tensor& like) {
  return paddle::empty(shape, dtype, like.place());
}

// The gradient of an output. It is absent if the output was not used, and unless it is optional
// Paddle then ends the process. Only Grad(Optional("Out")), which makes the output itself
// Optional("Out"), works in dynamic and in static graphs.
inline paddle::Tensor gradient_or_zeros(const OptionalTensor& gradient, const Shape& shape,
                                        const paddle::Tensor& like) {
  return gradient ? *gradient : paddle::full(shape, 0, like.dtype(), like.place());
}

// Both versions of a kernel, for launch() and workspace().
#ifdef PYPKG_WITH_CUDA
#define PYPKG_FORMS(name) name##_cpu, name##_cuda
#else
#define PYPKG_FORMS(name) name##_cpu, nullptr
#endif

// A parameter without template deduction, because the CUDA version may be nullptr.
template <typename T>
using NotDeduced = std::common_type_t<T>;

// Runs the version of a kernel for the place of a tensor, on its stream. Exceptions are converted
// to Paddle's, because Paddle ends the process on any other. A label or position out of range
// becomes an IndexError in Python.
template <typename Params>
void launch(const paddle::Tensor& at, void (*cpu)(const Params&),
            void (*cuda)(const NotDeduced<Params>&, Stream), const NotDeduced<Params>& params) {
  try {
    if (at.is_cpu()) return cpu(params);
#ifdef PYPKG_WITH_CUDA
    if (at.is_gpu()) return cuda(params, static_cast<Stream>(at.stream()));
#endif
  } catch (const std::out_of_range& error) {
    PADDLE_THROW(common::errors::OutOfRange("%s", error.what()));
  } catch (const std::invalid_argument& error) {
    reject(error.what());
  } catch (const std::exception& error) {
    PADDLE_THROW(common::errors::External("%s", error.what()));
  }
  reject("no compiled operator for a tensor on ", at.place());
}

// An uninitialised float32 tensor of the size that a kernel asks for.
template <typename Function, typename CudaFunction, typename... Sizes>
paddle::Tensor workspace(const paddle::Tensor& at, Function cpu, CudaFunction cuda,
                         const Sizes&... sizes) {
  int64_t count = cpu(sizes...);
  if constexpr (!std::is_null_pointer_v<CudaFunction>) {
    if (at.is_gpu()) count = cuda(sizes...);
  }
  return empty({count}, paddle::DataType::FLOAT32, at);
}

}  // namespace pypkg
