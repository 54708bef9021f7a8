#include "adamw.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::DataType;
using paddle::Tensor;

using Tensors = std::vector<Tensor>;

void check_count(const char* name, const Tensors& tensors, size_t expected) {
  if (tensors.size() == expected) return;
  reject("adamw: ", name, " must hold ", expected, " tensors like params, got ", tensors.size());
}

// float32, with the shape and the place of the parameter.
float* state(const char* name, const Tensor& tensor, const Tensor& param) {
  check_dtype(name, tensor, DataType::FLOAT32);
  check_shape(name, tensor, param.shape());
  check_place(name, tensor, param);
  return const_cast<float*>(tensor.data<float>());
}

// One float32 in host memory.
float* power(const char* name, const Tensor& tensor) {
  check_dtype(name, tensor, DataType::FLOAT32);
  check_shape(name, tensor, {1});
  if (!tensor.is_cpu()) reject(name, " must be in host memory, got ", tensor.place());
  return const_cast<float*>(tensor.data<float>());
}

void update(Tensors& params, const Tensors& grads, Tensors& moments1, Tensors& moments2,
            Tensors& beta1_powers, Tensors& beta2_powers, Tensors& masters,
            const OptionalTensor& grad_scale, const std::vector<float>& weight_decays,
            float learning_rate, float beta1, float beta2, float epsilon) {
  const size_t count = params.size();
  check_count("grads", grads, count);
  check_count("moments1", moments1, count);
  check_count("moments2", moments2, count);
  check_count("beta1_powers", beta1_powers, count);
  check_count("beta2_powers", beta2_powers, count);
  if (!masters.empty()) check_count("masters", masters, count);
  if (weight_decays.size() != count) {
    reject("adamw: ", count, " weight decays are needed, got ", weight_decays.size());
  }
  if (count == 0) return;
  std::vector<AdamWTensor> entries(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = params[i];
    check_dtype("adamw: each of params", param, params[0].dtype());
    check_place("adamw: each of params", param, params[0]);
    check_dtype("adamw: each of grads", grads[i], grads[0].dtype());
    check_shape("adamw: gradient", grads[i], param.shape());
    check_place("adamw: gradient", grads[i], param);
    entries[i].param = const_cast<void*>(raw(param));
    entries[i].grad = raw(grads[i]);
    entries[i].moment1 = state("adamw: moment1", moments1[i], param);
    entries[i].moment2 = state("adamw: moment2", moments2[i], param);
    entries[i].master = masters.empty() ? nullptr : state("adamw: master", masters[i], param);
    entries[i].numel = param.numel();
    entries[i].weight_decay = weight_decays[i];
    entries[i].beta1_power = *power("adamw: beta1_power", beta1_powers[i]);
    entries[i].beta2_power = *power("adamw: beta2_power", beta2_powers[i]);
  }
  AdamW p;
  p.tensors = entries.data();
  p.count = static_cast<int64_t>(count);
  p.dtype = kernel_dtype("adamw: params", params[0]);
  p.grad_dtype = kernel_dtype("adamw: grads", grads[0]);
  p.learning_rate = learning_rate;
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.epsilon = epsilon;
  if (grad_scale) {
    check_dtype("adamw: grad_scale", *grad_scale, DataType::FLOAT32);
    if (grad_scale->numel() != 1) reject("adamw: grad_scale must be one number");
    check_place("adamw: grad_scale", *grad_scale, params[0]);
    p.grad_scale = grad_scale->data<float>();
  }
  launch(params[0], PYPKG_FORMS(adamw), p);
  for (size_t i = 0; i < count; ++i) {
    *power("adamw: beta1_power", beta1_powers[i]) *= beta1;
    *power("adamw: beta2_power", beta2_powers[i]) *= beta2;
  }
}

}  // namespace
}  // namespace pypkg

// Masters may be empty. It is not optional: Paddle takes an optional list away if any tensor in it
// has no elements. For dynamic graphs: nothing here tells a static one what is written when.
PD_BUILD_OP(pypkg_adamw)
    .Inputs({paddle::Vec("Params"), paddle::Vec("Grads"), paddle::Vec("Moments1"),
             paddle::Vec("Moments2"), paddle::Vec("Beta1Powers"), paddle::Vec("Beta2Powers"),
             paddle::Vec("Masters"), paddle::Optional("GradScale")})
    .Outputs({paddle::Vec("ParamsOut"), paddle::Vec("Moments1Out"), paddle::Vec("Moments2Out"),
              paddle::Vec("Beta1PowersOut"), paddle::Vec("Beta2PowersOut"),
              paddle::Vec("MastersOut")})
    .Attrs({"weight_decays: std::vector<float>", "learning_rate: float", "beta1: float",
            "beta2: float", "epsilon: float"})
    .SetInplaceMap({{paddle::Vec("Params"), paddle::Vec("ParamsOut")},
                    {paddle::Vec("Moments1"), paddle::Vec("Moments1Out")},
                    {paddle::Vec("Moments2"), paddle::Vec("Moments2Out")},
                    {paddle::Vec("Beta1Powers"), paddle::Vec("Beta1PowersOut")},
                    {paddle::Vec("Beta2Powers"), paddle::Vec("Beta2PowersOut")},
                    {paddle::Vec("Masters"), paddle::Vec("MastersOut")}})
    .SetKernelFn(PD_KERNEL(pypkg::update));
