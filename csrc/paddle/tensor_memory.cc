// The only file that includes phi::DenseTensor. With PADDLE_WITH_CUDA its header would need the
// headers of cuBLAS, cuDNN and more; nothing used here depends on the macro.
#undef PADDLE_WITH_CUDA

#include "tensor_memory.h"

#include "paddle/phi/api/include/tensor.h"
#include "paddle/phi/core/dense_tensor.h"

namespace pypkg {

int64_t memory_holders(const paddle::Tensor& tensor) {
  return static_cast<const phi::DenseTensor&>(*tensor.impl()).Holder().use_count();
}

}  // namespace pypkg
