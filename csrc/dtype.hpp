// The element types that operators know. Apart from everything else, so that CUDA sources can name them too.
#pragma once

namespace gradmix {

enum class Dtype { kFloat16, kBfloat16, kFloat32, kFloat64, kInt64, kUint8 };

}  // namespace gradmix
