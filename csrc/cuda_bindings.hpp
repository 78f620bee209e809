// The Python face of the CUDA bodies.
#pragma once

#include <pybind11/pybind11.h>

namespace gradmix {

void bind_cuda(pybind11::module_& module);

}  // namespace gradmix
