// The Python face of the CUDA bodies: arguments in, checks, the lock released around the launches. No arithmetic.
#include "cuda_bindings.hpp"

#include <cstdint>
#include <initializer_list>
#include <string>

#include "class_sketch_cuda.hpp"
#include "sketch_project_cuda.hpp"
#include "tensor_view.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace gradmix {
namespace {

constexpr std::int32_t kCuda = dlpack::kDeviceCuda;
constexpr std::initializer_list<Dtype> kFloating = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16};

Dtype floating_dtype(const std::string& name) {
  for (const Dtype dtype : kFloating) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw py::value_error("dtype: got '" + name + "', expected float32, float64, bfloat16 or float16");
}

Dtype result_dtype(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

void require_least(const char* argument, std::int64_t value, std::int64_t least) {
  if (value >= least) return;
  throw py::value_error(std::string(argument) + ": got " + std::to_string(value) + ", expected at least " +
                        std::to_string(least));
}

void require_same_device(const TensorView& view, const TensorView& first) {
  if (view.device_id() == first.device_id()) return;
  throw py::value_error(std::string(view.argument()) + ": got a tensor on CUDA device " + std::to_string(view.device_id()) +
                        ", expected " + std::to_string(first.device_id()) + " as " + first.argument());
}

void require_workspace(const TensorView& workspace, std::int64_t elements) {
  if (workspace.numel() >= elements) return;
  throw py::value_error("workspace: got " + std::to_string(workspace.numel()) + " elements, expected at least " +
                        std::to_string(elements));
}

void py_class_sketch_cuda(const py::object& deltas_object, const py::object& activations_object,
                          const py::object& order_object, const py::object& labels_object, const py::object& starts_object,
                          const py::object& sums_object, const py::object& squares_object,
                          const py::object& workspace_object, std::uintptr_t stream) {
  const TensorView deltas(deltas_object, "deltas", kFloating, "(N, T, K)", 3, Accept::on(kCuda));
  const Dtype result = result_dtype(deltas.dtype());
  const TensorView activations(activations_object, "activations", {deltas.dtype()}, "(N, T, J)", 3, Accept::on(kCuda));
  const TensorView order(order_object, "order", {Dtype::kInt64}, "(N,)", 1, Accept::on(kCuda));
  const TensorView labels(labels_object, "labels", {Dtype::kInt64}, "(N,)", 1, Accept::on(kCuda));
  const TensorView starts(starts_object, "starts", {Dtype::kInt64}, "(P + 1,)", 1, Accept::on(kCuda));
  const TensorView sums(sums_object, "sums", {result}, "(P, K, J)", 3, Accept::writing(kCuda));
  const TensorView squares(squares_object, "squares", {result}, "(P,)", 1, Accept::writing(kCuda));
  const TensorView workspace(workspace_object, "workspace", {result}, "(elements,)", 1, Accept::writing(kCuda));

  activations.require_size(0, deltas.size(0), "N of deltas");
  activations.require_size(1, deltas.size(1), "T of deltas");
  order.require_size(0, deltas.size(0), "N of deltas");
  labels.require_size(0, deltas.size(0), "N of deltas");
  starts.require_size(0, sums.size(0) + 1, "P of sums and one more");
  sums.require_size(1, deltas.size(2), "K of deltas");
  sums.require_size(2, activations.size(2), "J of activations");
  squares.require_size(0, sums.size(0), "P of sums");
  require_workspace(workspace, class_sketch_cuda_workspace(deltas.dtype(), deltas.size(0), deltas.size(1), deltas.size(2),
                                                           activations.size(2)));
  for (const TensorView* view : {&activations, &order, &labels, &starts, &sums, &squares, &workspace}) {
    require_same_device(*view, deltas);
  }
  for (const TensorView* output : {&sums, &squares, &workspace}) {
    for (const TensorView* input : {&deltas, &activations, &order, &labels, &starts}) output->require_apart(*input);
  }
  sums.require_apart(squares);
  sums.require_apart(workspace);
  squares.require_apart(workspace);

  const ClassSketchCuda problem{deltas.dtype(),          deltas.data(),         activations.data(),
                                order.as<std::int64_t>(), labels.as<std::int64_t>(), starts.as<std::int64_t>(),
                                sums.mutable_data(),     squares.mutable_data(), workspace.mutable_data(),
                                deltas.size(0),          deltas.size(1),        deltas.size(2),
                                activations.size(2),     sums.size(0)};
  py::gil_scoped_release unlocked;
  class_sketch_cuda(problem, deltas.device_id(), stream);
}

void py_sketch_project_cuda(const py::object& x_object, std::int64_t key, bool ones, const py::object& out_object,
                            const py::object& workspace_object, std::uintptr_t stream) {
  const TensorView x(x_object, "x", kFloating, "(N, T, D)", 3, Accept::strided(kCuda));
  const Dtype result = result_dtype(x.dtype());
  const TensorView out(out_object, "out", {result}, "(N, T, rank)", 3, Accept::writing(kCuda));
  const TensorView workspace(workspace_object, "workspace", {result}, "(elements,)", 1, Accept::writing(kCuda));

  if (x.size(2) > 1 && x.stride(2) != 1 && x.size(1) > 1 && x.stride(1) != 1) {
    throw py::value_error("x: got strides (" + std::to_string(x.stride(0)) + ", " + std::to_string(x.stride(1)) + ", " +
                          std::to_string(x.stride(2)) + "), expected a stride of 1 along T or D");
  }
  out.require_size(0, x.size(0), "N of x");
  out.require_size(1, x.size(1), "T of x");
  require_workspace(workspace,
                    sketch_project_cuda_workspace(x.dtype(), x.size(0), x.size(1), x.size(2), out.size(2)));
  require_same_device(out, x);
  require_same_device(workspace, x);
  out.require_apart(x);
  workspace.require_apart(x);
  out.require_apart(workspace);

  const SketchProjectCuda problem{x.dtype(),          x.data(),  {x.stride(0), x.stride(1), x.stride(2)},
                                  out.mutable_data(), workspace.mutable_data(), x.size(0), x.size(1), x.size(2),
                                  out.size(2),        key,       ones};
  py::gil_scoped_release unlocked;
  sketch_project_cuda(problem, x.device_id(), stream);
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def(
      "class_sketch_cuda_workspace",
      [](const std::string& dtype, std::int64_t samples, std::int64_t positions, std::int64_t rows, std::int64_t columns) {
        require_least("samples", samples, 0);
        require_least("positions", positions, 0);
        require_least("rows", rows, 0);
        require_least("columns", columns, 0);
        return class_sketch_cuda_workspace(floating_dtype(dtype), samples, positions, rows, columns);
      },
      "dtype"_a, "samples"_a, "positions"_a, "rows"_a, "columns"_a, "Elements that class_sketch_cuda needs to work in.");
  module.def("class_sketch_cuda", &py_class_sketch_cuda, "deltas"_a, "activations"_a, "order"_a, "labels"_a, "starts"_a,
             "sums"_a, "squares"_a, "workspace"_a, "stream"_a,
             "Queues class_sketch of CUDA tensors on a stream; order, labels and starts are those of the samples sorted by "
             "class.");
  module.def(
      "sketch_project_cuda_workspace",
      [](const std::string& dtype, std::int64_t samples, std::int64_t positions, std::int64_t dim, std::int64_t rank) {
        require_least("samples", samples, 0);
        require_least("positions", positions, 0);
        require_least("dim", dim, 0);
        require_least("rank", rank, 1);
        return sketch_project_cuda_workspace(floating_dtype(dtype), samples, positions, dim, rank);
      },
      "dtype"_a, "samples"_a, "positions"_a, "dim"_a, "rank"_a, "Elements that sketch_project_cuda needs to work in.");
  module.def("sketch_project_cuda", &py_sketch_project_cuda, "x"_a, "key"_a, "ones"_a, "out"_a, "workspace"_a, "stream"_a,
             "Queues sketch_project of a CUDA tensor, with Rademacher entries, on a stream.");
}

}  // namespace gradmix
