// adamw as Python functions: the one kernel whose arguments are lists of arrays.
#include "adamw/adamw.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "kernels.h"

namespace py = pybind11;
using py::arg;
using py::object;

namespace pypkg {
namespace {

// What adamw takes for each parameter: (param, grad, moment1, moment2, master or None,
// weight_decay, beta1_power, beta2_power).
using AdamWArguments = std::tuple<object, object, object, object, object, float, float, float>;

using Addresses = std::vector<std::uintptr_t>;

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void adamw_at(const Addresses& params, const Addresses& grads, const Addresses& moments1,
              const Addresses& moments2, const Addresses& masters, const Addresses& beta1_powers,
              const Addresses& beta2_powers, const std::vector<int64_t>& sizes,
              const std::vector<float>& weight_decays, const std::string& dtype,
              const std::string& grad_dtype, std::uintptr_t grad_scale, float learning_rate,
              float beta1, float beta2, float epsilon, std::optional<std::intptr_t> stream) {
  const size_t count = params.size();
  for (const Addresses* each : {&grads, &moments1, &moments2, &beta1_powers, &beta2_powers}) {
    if (each->size() != count) throw std::invalid_argument("adamw: lists differ in length");
  }
  if (sizes.size() != count || weight_decays.size() != count ||
      (!masters.empty() && masters.size() != count)) {
    throw std::invalid_argument("adamw: lists differ in length");
  }
  std::vector<AdamWTensor> entries(count);
  for (size_t i = 0; i < count; ++i) {
    entries[i].param = at<void>(params[i]);
    entries[i].grad = at<void>(grads[i]);
    entries[i].moment1 = at<float>(moments1[i]);
    entries[i].moment2 = at<float>(moments2[i]);
    entries[i].master = masters.empty() ? nullptr : at<float>(masters[i]);
    entries[i].numel = sizes[i];
    entries[i].weight_decay = weight_decays[i];
    entries[i].beta1_power = *at<float>(beta1_powers[i]);
    entries[i].beta2_power = *at<float>(beta2_powers[i]);
  }
  AdamW p;
  p.tensors = entries.data();
  p.count = static_cast<int64_t>(count);
  p.dtype = dtype_named(dtype, "adamw");
  p.grad_dtype = dtype_named(grad_dtype, "adamw");
  p.learning_rate = learning_rate;
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.epsilon = epsilon;
  p.grad_scale = at<float>(grad_scale);
  if (stream) {
#ifdef PYPKG_WITH_CUDA
    adamw_cuda(p, reinterpret_cast<Stream>(*stream));
#else
    throw std::invalid_argument("adamw: tensors on a GPU, but pypkg was built without CUDA");
#endif
  } else {
    adamw_cpu(p);
  }
  for (size_t i = 0; i < count; ++i) {
    *at<float>(beta1_powers[i]) *= beta1;
    *at<float>(beta2_powers[i]) *= beta2;
  }
}

}  // namespace

void bind_adamw(py::module_& m) {
  m.def(
      "adamw",
      [](const std::vector<AdamWArguments>& tensors, object grad_scale, float learning_rate,
         float beta1, float beta2, float epsilon, std::intptr_t stream) {
        Arguments args("adamw", stream);
        std::vector<AdamWTensor> entries;
        for (const auto& [param, grad, moment1, moment2, master, decay, power1, power2] : tensors) {
          const std::string size = "size of param " + std::to_string(entries.size());
          const Dim dim = size.c_str();
          AdamWTensor entry;
          entry.param = args.required("param", param, "T", {dim});
          entry.grad = args.required("grad", grad, "G", {dim});
          entry.moment1 = args.required("moment1", moment1, "float32", {dim});
          entry.moment2 = args.required("moment2", moment2, "float32", {dim});
          entry.master = args.optional("master", master, "float32", {dim});
          entry.numel = args[size];
          entry.weight_decay = decay;
          entry.beta1_power = power1;
          entry.beta2_power = power2;
          entries.push_back(entry);
        }
        args.check(!entries.empty(), "there is no tensor");
        AdamW p;
        p.tensors = entries.data();
        p.count = static_cast<int64_t>(entries.size());
        p.dtype = args.dtype("T");
        p.grad_dtype = args.dtype("G");
        p.learning_rate = learning_rate;
        p.beta1 = beta1;
        p.beta2 = beta2;
        p.epsilon = epsilon;
        p.grad_scale = args.optional("grad_scale", grad_scale, "float32", {1});
        args.run(p, PYPKG_KERNEL(adamw));
      },
      "One AdamW step of many tensors, in place. tensors: tuples (param, grad, moment1, moment2, "
      "master or None, weight_decay, beta1_power, beta2_power) of vectors of one size each; "
      "moments and master are float32, powers beta^t in step t. grad_scale: float32 [1].",
      arg("tensors"), arg("grad_scale") = py::none(), py::kw_only(), arg("learning_rate"),
      arg("beta1") = 0.9f, arg("beta2") = 0.999f, arg("epsilon") = 1e-8f, arg("stream") = 0);
  m.def("adamw_at", &adamw_at, py::call_guard<py::gil_scoped_release>(),
        "The same by lists of addresses, which are not checked: of contiguous arrays of `sizes` "
        "elements each, and of float32 powers in host memory, which are multiplied by beta1 and "
        "beta2 after the step. masters may be empty; grad_scale 0: none; stream: of the GPU where "
        "the arrays are, None: in host memory.",
        py::kw_only(), arg("params"), arg("grads"), arg("moments1"), arg("moments2"),
        arg("masters"), arg("beta1_powers"), arg("beta2_powers"), arg("sizes"),
        arg("weight_decays"), arg("dtype"), arg("grad_dtype"), arg("grad_scale"),
        arg("learning_rate"), arg("beta1"), arg("beta2"), arg("epsilon"), arg("stream"));
}

}  // namespace pypkg
