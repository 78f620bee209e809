// The Python face of the extension: arguments in, checks, the lock released around the work. No arithmetic.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "class_sketch.hpp"
#include "cpu_level.hpp"
#include "forked.hpp"
#include "sketch_project.hpp"
#include "tensor_view.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(GRADMIX_CUDA)
#include "cuda_bindings.hpp"
#include "cuda_devices.hpp"
#endif

#define GRADMIX_TEXT_(x) #x
#define GRADMIX_TEXT(x) GRADMIX_TEXT_(x)

namespace py = pybind11;
using namespace py::literals;

namespace gradmix {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = GRADMIX_VERSION;
  info["compiler"] = GRADMIX_COMPILER;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["build_type"] = GRADMIX_BUILD_TYPE;
  info["python_abi"] = "cp" GRADMIX_TEXT(PY_MAJOR_VERSION) GRADMIX_TEXT(PY_MINOR_VERSION);
#if defined(_OPENMP)
  info["openmp"] = static_cast<long>(_OPENMP);
#else
  info["openmp"] = py::none();
#endif
  info["instruction_set"] = cpu_level_name();
#if defined(GRADMIX_CUDA)
  info["cuda"] = true;
  info["cuda_version"] = GRADMIX_CUDA_VERSION;
  py::list architectures;
  for (const auto& part : py::str(GRADMIX_CUDA_ARCHITECTURES).attr("split")(",")) architectures.append(part);
  info["cuda_architectures"] = py::tuple(architectures);
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_architectures"] = py::tuple();
#endif
  return info;
}

py::dict cuda_devices() {
  py::dict answer;
  py::list devices;
#if defined(GRADMIX_CUDA)
  const CudaDevices found = [] {
    py::gil_scoped_release unlocked;
    return query_cuda_devices();
  }();
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  for (const CudaDevice& device : found.devices) {
    devices.append(py::dict("name"_a = device.name,
                            "capability"_a = std::to_string(device.major) + "." + std::to_string(device.minor),
                            "memory"_a = device.memory));
  }
  answer["error"] = found.error.empty() ? py::object(py::none()) : py::object(py::str(found.error));
  answer["runtime"] = py::str(version(found.runtime_version));
  answer["driver"] = found.driver_version == 0 ? py::object(py::none()) : py::object(py::str(version(found.driver_version)));
#else
  answer["error"] = "the extension was built without CUDA";
  answer["runtime"] = py::none();
  answer["driver"] = py::none();
#endif
  answer["devices"] = devices;
  return answer;
}

int thread_count(const py::object& num_threads) {
  int threads = 1;
#if defined(_OPENMP)
  threads = omp_get_max_threads();
#endif
  if (!num_threads.is_none()) {
    if (!py::isinstance<py::int_>(num_threads)) {
      throw py::type_error("num_threads: got " + std::string(py::str(py::type::of(num_threads).attr("__name__"))) +
                           ", expected an int or None");
    }
    int overflow = 0;
    const long long wanted = PyLong_AsLongLongAndOverflow(num_threads.ptr(), &overflow);
    if (overflow < 0 || (overflow == 0 && wanted < 1)) {
      throw py::value_error("num_threads: got " + std::string(py::str(num_threads)) + ", expected at least 1");
    }
    if (overflow > 0 || wanted > std::numeric_limits<int>::max()) {
      throw py::value_error("num_threads: got " + std::string(py::str(num_threads)) + ", expected at most " +
                            std::to_string(std::numeric_limits<int>::max()));
    }
#if defined(_OPENMP)
    // More threads than this only cost; the result is the same for any number.
    threads = static_cast<int>(std::min<std::int64_t>(wanted, std::max(omp_get_num_procs(), 8)));
#endif
  }
  return forked() ? 1 : threads;
}

void py_class_sketch(const py::object& deltas_object, const py::object& activations_object,
                     const py::object& labels_object, const py::object& sums_object,
                     const py::object& squares_object, const py::object& num_threads) {
  const auto floating = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16};
  const TensorView deltas(deltas_object, "deltas", floating, "(N, T, K)", 3);
  const TensorView activations(activations_object, "activations", {deltas.dtype()}, "(N, T, J)", 3);
  const TensorView labels(labels_object, "labels", {Dtype::kInt64}, "(N,)", 1);
  const Dtype result = deltas.dtype() == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const TensorView sums(sums_object, "sums", {result}, "(P, K, J)", 3, Accept::writing());
  const TensorView squares(squares_object, "squares", {result}, "(P,)", 1, Accept::writing());

  activations.require_size(0, deltas.size(0), "N of deltas");
  activations.require_size(1, deltas.size(1), "T of deltas");
  labels.require_size(0, deltas.size(0), "N of deltas");
  sums.require_size(1, deltas.size(2), "K of deltas");
  sums.require_size(2, activations.size(2), "J of activations");
  squares.require_size(0, sums.size(0), "P of sums");
  for (const TensorView* input : {&deltas, &activations, &labels}) {
    sums.require_apart(*input);
    squares.require_apart(*input);
  }
  squares.require_apart(sums);
  const int threads = thread_count(num_threads);

  const ClassSketch problem{deltas.dtype(),       deltas.data(),          activations.data(), labels.as<std::int64_t>(),
                            sums.mutable_data(),  squares.mutable_data(), deltas.size(0),     deltas.size(1),
                            deltas.size(2),       activations.size(2),    sums.size(0)};
  std::int64_t bad = -1;
  {
    py::gil_scoped_release unlocked;
    bad = first_bad_label(problem.labels, problem.samples, problem.classes);
    if (bad < 0) class_sketch(problem, threads);
  }
  if (bad >= 0) {
    throw py::value_error("labels: got " + std::to_string(problem.labels[bad]) + " in row " + std::to_string(bad) +
                          ", expected labels in [0, " + std::to_string(problem.classes) + ")");
  }
}

void py_sketch_project(const py::object& x_object, std::int64_t key, bool ones, const py::object& out_object,
                       const py::object& num_threads) {
  const auto floating = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16};
  const TensorView x(x_object, "x", floating, "(N, T, D)", 3, Accept::strided());
  const Dtype result = x.dtype() == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const TensorView out(out_object, "out", {result}, "(N, T, rank)", 3, Accept::writing());
  out.require_size(0, x.size(0), "N of x");
  out.require_size(1, x.size(1), "T of x");
  out.require_apart(x);
  const int threads = thread_count(num_threads);

  const SketchProject problem{x.dtype(),   x.data(),    x.size(0), x.size(1), x.size(2),   x.stride(0),
                              x.stride(1), x.stride(2), ones,      key,       out.size(2), out.mutable_data()};
  if (!sketch_project_takes(problem)) {
    throw py::value_error("x: got strides (" + std::to_string(x.stride(0)) + ", " + std::to_string(x.stride(1)) + ", " +
                          std::to_string(x.stride(2)) + ") for shape " + x.shape_text() +
                          ", expected T or D to be contiguous");
  }
  py::gil_scoped_release unlocked;
  sketch_project(problem, threads);
}

}  // namespace
}  // namespace gradmix

PYBIND11_MODULE(_C, module) {
  gradmix::forked();  // remembers this process
  module.doc() = "Native bodies of gradmix's operators. Tensors come by DLPack; results are written into tensors given.";
  module.def("build_info", &gradmix::build_info, "How this extension was built, as a dict.");
  module.def("cuda_devices", &gradmix::cuda_devices,
             "CUDA devices as the extension's own runtime sees them; a missing driver is told under 'error'.");
  module.def("class_sketch", &gradmix::py_class_sketch, "deltas"_a, "activations"_a, "labels"_a, "sums"_a,
             "squares"_a, "num_threads"_a = py::none(),
             "Writes the sum over n with labels[n] == p of G = sum over t of deltas[n, t, :] activations[n, t, :]^T into "
             "sums[p], and that of the squares of G's norm into squares[p].");
  module.def("sketch_project", &gradmix::py_sketch_project, "x"_a, "key"_a, "ones"_a, "out"_a,
             "num_threads"_a = py::none(),
             "Writes x times the transposed random sign matrix of `key`, of as many rows as out's last axis has, into out.");
#if defined(GRADMIX_CUDA)
  gradmix::bind_cuda(module);
#endif
}
