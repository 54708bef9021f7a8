#pragma once

#include <cstdint>

namespace paddle {
class Tensor;
}

namespace pypkg {

// How many tensor objects hold the memory of this one (itself, its views, their base). Objects
// that share one implementation, as a tensor and its detach() do, count once.
int64_t memory_holders(const paddle::Tensor& tensor);

}  // namespace pypkg
