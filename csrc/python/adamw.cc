// adamw as a Python function: the one kernel whose arguments are a list of arrays.
#include "adamw.h"

#include <pybind11/stl.h>

#include <tuple>

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
}

}  // namespace pypkg
