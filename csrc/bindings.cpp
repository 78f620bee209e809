// The Python face of the extension: arguments in, checks, the lock released around the work. No arithmetic.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "all_finite.hpp"
#include "class_sketch.hpp"
#include "cpu_level.hpp"
#include "draw_partners.hpp"
#include "forked.hpp"
#include "mix_samples.hpp"
#include "mixed_alignment.hpp"
#include "off_linear.hpp"
#include "residuals.hpp"
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

// ValueError unless each entry (N,) is in [0, limit); `what` they are, for the message.
void require_below(const TensorView& index, std::int64_t limit, const char* what) {
  const std::int64_t bad = first_bad_label(index.as<std::int64_t>(), index.size(0), limit);
  if (bad < 0) return;
  throw py::value_error(std::string(index.argument()) + ": got " + std::to_string(index.as<std::int64_t>()[bad]) +
                        " in row " + std::to_string(bad) + ", expected " + what + " in [0, " + std::to_string(limit) + ")");
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
  require_below(labels, sums.size(0), "labels");
  const int threads = thread_count(num_threads);

  const ClassSketch problem{deltas.dtype(), deltas.data(), activations.data(), labels.as<std::int64_t>(),
                            sums.mutable_data(), squares.mutable_data(), deltas.size(0), deltas.size(1),
                            deltas.size(2), activations.size(2), sums.size(0)};
  py::gil_scoped_release unlocked;
  class_sketch(problem, threads);
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

  const SketchProject problem{x.dtype(), x.data(), x.size(0), x.size(1), x.size(2), x.stride(0),
                              x.stride(1), x.stride(2), ones, key, out.size(2), out.mutable_data()};
  if (!sketch_project_takes(problem)) {
    throw py::value_error("x: got strides (" + std::to_string(x.stride(0)) + ", " + std::to_string(x.stride(1)) + ", " +
                          std::to_string(x.stride(2)) + ") for shape " + x.shape_text() +
                          ", expected T or D to be contiguous");
  }
  py::gil_scoped_release unlocked;
  sketch_project(problem, threads);
}

std::optional<TensorView> optional_view(const py::object& object, const char* argument,
                                        std::initializer_list<Dtype> dtypes, const char* axes, std::int32_t ndim,
                                        const Accept& accept = {}) {
  if (object.is_none()) return std::nullopt;
  return std::optional<TensorView>(std::in_place, object, argument, dtypes, axes, ndim, accept);
}

// One side of mixed_alignment, checked; the tensors live as long as this. `suffix` is that of the arguments' names.
class SideViews {
 public:
  SideViews(const py::tuple& side, const std::string& suffix, std::initializer_list<Dtype> dtypes)
      : names_{"features" + suffix, "logits" + suffix, "labels" + suffix, "projected" + suffix, "beside" + suffix},
        features(side[0], names_[0].c_str(), dtypes, "(N, d)", 2),
        logits(side[1], names_[1].c_str(), {features.dtype()}, "(N, C)", 2),
        labels(side[2], names_[2].c_str(), {Dtype::kInt64}, "(N,)", 1),
        projected(side[3], names_[3].c_str(), {features.dtype()}, "(N, C)", 2),
        beside(optional_view(side[4], names_[4].c_str(), {features.dtype()}, "(N, C)", 2)) {
    for (const TensorView* view : {&logits, &projected, beside ? &*beside : &logits}) {
      view->require_size(0, features.size(0), "N of the features");
      view->require_size(1, logits.size(1), "C of the logits");
    }
    labels.require_size(0, features.size(0), "N of the features");
  }

  MixedSide side() const {
    return {features.data(), logits.data(), labels.as<std::int64_t>(), projected.data(),
            beside ? beside->data() : nullptr, features.size(0)};
  }

 private:
  const std::string names_[5];

 public:
  const TensorView features, logits, labels, projected;
  const std::optional<TensorView> beside;
};

bool py_mixed_alignment(const py::tuple& a_objects, const py::tuple& b_objects, const py::object& reference_object,
                        const py::object& lams_object, const py::tuple& products, const py::object& inner_object,
                        const py::object& norm_object, const py::object& units, const py::object& num_threads) {
  if (a_objects.size() != 5 || b_objects.size() != 5 || products.size() != 3) {
    throw py::value_error("a, b, products: expected tuples of 5, 5 and 3");
  }
  const SideViews a(a_objects, "_a", {Dtype::kFloat32, Dtype::kFloat64});
  const Dtype dtype = a.features.dtype();
  const SideViews b(b_objects, "_b", {dtype});
  const TensorView reference(reference_object, "reference", {dtype}, "(C, d) or (C, d + 1)", 2);
  const TensorView lams(lams_object, "lams", {Dtype::kFloat64}, "(L,)", 1);
  const TensorView inner(inner_object, "inner", {dtype}, "(L, N, M)", 3, Accept::writing());
  const auto norm = optional_view(norm_object, "norm", {dtype}, "(L, N, M)", 3, Accept::writing());
  const auto gram = optional_view(products[0], "gram", {dtype}, "(N, M)", 2);
  const auto toward = optional_view(products[1], "toward", {dtype}, "(N, M)", 2);
  const auto beside = optional_view(products[2], "beside", {dtype}, "(N, M)", 2);

  const std::int64_t classes = a.logits.size(1), width = a.features.size(1);
  b.features.require_size(1, width, "d of features_a");
  b.logits.require_size(1, classes, "C of logits_a");
  reference.require_size(0, classes, "C of the logits");
  const bool bias = reference.size(1) == width + 1;
  if (!bias) reference.require_size(1, width, "d of the features");
  inner.require_size(0, lams.size(0), "L of lams");
  inner.require_size(1, a.features.size(0), "N of features_a");
  inner.require_size(2, b.features.size(0), "N of features_b");
  const bool vectors = a.beside && b.beside;
  if (a.beside.has_value() != b.beside.has_value() || (norm && !gram) || (vectors && !(norm && toward && beside))) {
    throw py::value_error("products: expected gram where norms are wanted, and where labels are vectors all three and norms");
  }
  for (const auto* product : {&gram, &toward, &beside}) {
    if (!*product) continue;
    (*product)->require_size(0, inner.size(1), "N of features_a");
    (*product)->require_size(1, inner.size(2), "N of features_b");
  }
  if (norm) {
    for (std::size_t axis = 0; axis < 3; ++axis) norm->require_size(axis, inner.size(axis), "as inner");
    norm->require_apart(inner);
  }
  require_below(a.labels, classes, "labels");
  require_below(b.labels, classes, "labels");
  const int threads = thread_count(num_threads);

  const auto data = [](const std::optional<TensorView>& view) { return view ? view->mutable_data() : nullptr; };
  const auto [features_unit, reference_unit, least] =
      units.is_none() ? std::tuple(1.0, 1.0, 0.0) : units.cast<std::tuple<double, double, double>>();
  const MixedAlignment problem{
      a.side(), b.side(), dtype, reference.data(), data(gram), data(toward), data(beside), lams.as<double>(),
      inner.mutable_data(), data(norm), lams.size(0), classes, width, bias, !units.is_none(), features_unit, reference_unit, least};
  py::gil_scoped_release unlocked;
  return mixed_alignment(problem, threads);
}

void py_draw_partners(const py::object& allowed_object, const py::object& score_object, const py::object& drawn_object,
                      std::int64_t columns, bool own_rows, const py::object& partner_object,
                      const py::object& found_object) {
  const TensorView drawn(drawn_object, "drawn", {Dtype::kFloat64, Dtype::kInt64}, "(N,)", 1);
  const auto allowed = optional_view(allowed_object, "allowed", {Dtype::kUint8}, "(N, M)", 2);
  const auto score = optional_view(score_object, "score", {Dtype::kFloat32, Dtype::kFloat64}, "(N, M)", 2);
  const TensorView partner(partner_object, "partner", {Dtype::kInt64}, "(N,)", 1, Accept::writing());
  const TensorView found(found_object, "found", {Dtype::kUint8}, "(N,)", 1, Accept::writing());
  const std::int64_t rows = drawn.size(0);
  for (const auto* matrix : {&allowed, &score}) {
    if (!*matrix) continue;
    (*matrix)->require_size(0, rows, "N of drawn");
    (*matrix)->require_size(1, columns, "columns");
  }
  partner.require_size(0, rows, "N of drawn");
  found.require_size(0, rows, "N of drawn");
  if (columns < 0) throw py::value_error("columns: got " + std::to_string(columns) + ", expected at least 0");
  if (own_rows && columns != rows) {
    throw py::value_error("columns: got " + std::to_string(columns) + ", expected " + std::to_string(rows) +
                          " as drawn, with own_rows");
  }
  const bool by_rank = drawn.dtype() == Dtype::kFloat64;
  const DrawPartners problem{allowed ? static_cast<const std::uint8_t*>(allowed->data()) : nullptr,
                             score ? score->data() : nullptr,
                             score && score->dtype() == Dtype::kFloat64,
                             by_rank ? drawn.as<double>() : nullptr,
                             by_rank ? nullptr : drawn.as<std::int64_t>(),
                             own_rows,
                             rows,
                             columns,
                             static_cast<std::int64_t*>(partner.mutable_data()),
                             static_cast<std::uint8_t*>(found.mutable_data())};
  py::gil_scoped_release unlocked;
  draw_partners(problem);
}

void py_mix_samples(const py::object& own_object, const py::object& other_object, const py::object& partner_object,
                    const py::object& lam_object, const py::object& out_object, const py::object& num_threads) {
  const TensorView own(own_object, "own", {Dtype::kFloat32, Dtype::kFloat64}, "(N, K)", 2);
  const Dtype dtype = own.dtype();
  const TensorView other(other_object, "other", {dtype}, "(M, K)", 2);
  const TensorView partner(partner_object, "partner", {Dtype::kInt64}, "(N,)", 1);
  const TensorView lam(lam_object, "lam", {dtype}, "(N,)", 1);
  const TensorView out(out_object, "out", {dtype}, "(N, K)", 2, Accept::writing());
  other.require_size(1, own.size(1), "K of own");
  out.require_size(1, own.size(1), "K of own");
  for (const TensorView* view : {&partner, &lam, &out}) view->require_size(0, own.size(0), "N of own");
  out.require_apart(own);
  out.require_apart(other);
  require_below(partner, other.size(0), "an index");
  const int threads = thread_count(num_threads);
  const MixSamples problem{own.data(),         other.data(), partner.as<std::int64_t>(), lam.data(),
                           out.mutable_data(), dtype,        own.size(0),                own.size(1)};
  py::gil_scoped_release unlocked;
  mix_samples(problem, threads);
}

void py_residuals(const py::object& logits_object, const py::object& labels_object, const py::object& out_object,
                  const py::object& num_threads) {
  const TensorView logits(logits_object, "logits", {Dtype::kFloat32, Dtype::kFloat64}, "(N, C)", 2);
  const TensorView labels(labels_object, "labels", {Dtype::kInt64}, "(N,)", 1);
  const TensorView out(out_object, "out", {logits.dtype()}, "(N, C)", 2, Accept::writing());
  labels.require_size(0, logits.size(0), "N of the logits");
  out.require_size(0, logits.size(0), "N of the logits");
  out.require_size(1, logits.size(1), "C of the logits");
  out.require_apart(logits);
  require_below(labels, logits.size(1), "labels");
  const int threads = thread_count(num_threads);
  const Residuals problem{logits.data(),  labels.as<std::int64_t>(), out.mutable_data(),
                          logits.dtype(), logits.size(0),            logits.size(1)};
  py::gil_scoped_release unlocked;
  residuals(problem, threads);
}

bool py_off_linear(const py::object& features_object, const py::object& logits_object, const py::object& weight_object,
                   const py::object& bias_object, std::int64_t step, double tolerance) {
  const TensorView features(features_object, "features", {Dtype::kFloat32}, "(N, d)", 2);
  const TensorView logits(logits_object, "logits", {Dtype::kFloat32}, "(N, C)", 2);
  const TensorView weight(weight_object, "weight", {Dtype::kFloat32}, "(C, d)", 2);
  const auto bias = optional_view(bias_object, "bias", {Dtype::kFloat32}, "(C,)", 1);
  logits.require_size(0, features.size(0), "N of the features");
  weight.require_size(0, logits.size(1), "C of the logits");
  weight.require_size(1, features.size(1), "d of the features");
  if (bias) bias->require_size(0, logits.size(1), "C of the logits");
  if (step < 1) throw py::value_error("step: got " + std::to_string(step) + ", expected at least 1");
  const OffLinear problem{features.as<float>(), logits.as<float>(), weight.as<float>(), bias ? bias->as<float>() : nullptr,
                          features.size(0),     features.size(1),   logits.size(1),     step, tolerance};
  py::gil_scoped_release unlocked;
  return off_linear(problem);
}

bool py_live_labels(const py::object& labels_object, const py::object& logits_object, double masked) {
  const TensorView labels(labels_object, "labels", {Dtype::kInt64}, "(N,)", 1);
  const TensorView logits(logits_object, "logits", {Dtype::kFloat32, Dtype::kFloat64}, "(N, C)", 2);
  labels.require_size(0, logits.size(0), "N of the logits");
  const std::int64_t classes = logits.size(1);
  const bool doubles = logits.dtype() == Dtype::kFloat64;
  for (std::int64_t i = 0; i < labels.size(0); ++i) {
    const std::int64_t label = labels.as<std::int64_t>()[i];
    if (label < 0 || label >= classes) return false;
    const std::int64_t at = i * classes + label;
    if (!((doubles ? logits.as<double>()[at] : static_cast<double>(logits.as<float>()[at])) > masked)) return false;
  }
  return true;
}

bool py_all_finite(const py::tuple& values, const py::object& num_threads) {
  const int threads = thread_count(num_threads);
  for (const auto& value : values) {
    const TensorView view(py::reinterpret_borrow<py::object>(value), "values",
                          {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16}, "(K,)", 1);
    py::gil_scoped_release unlocked;
    if (!all_finite(view.data(), view.numel(), view.dtype(), threads)) return false;
  }
  return true;
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
  module.def("mixed_alignment", &gradmix::py_mixed_alignment, "a"_a, "b"_a, "reference"_a, "lams"_a, "products"_a,
             "inner"_a, "norm"_a, "units"_a = py::none(), "num_threads"_a = py::none(),
             "Writes <g, reference> of all mixtures of a sample of a with one of b into inner, and ||g|| into norm unless "
             "that is None. a, b: (features, logits, labels, projections, None or what label vectors lack to one-hot ones). "
             "products: of the features; of what is lacked with the projections; twice that with itself. units: (of the "
             "features, of the reference, least size of a residual). False, and nothing written: units are None, and "
             "these are not near 1.");
  module.def("draw_partners", &gradmix::py_draw_partners, "allowed"_a, "score"_a, "drawn"_a, "columns"_a, "own_rows"_a,
             "partner"_a, "found"_a,
             "Writes one allowed column of each row into partner, and whether there is one into found. drawn: numbers in "
             "[0, 1), or columns. score: None, or of the allowed columns only those of the largest score count.");
  module.def("mix_samples", &gradmix::py_mix_samples, "own"_a, "other"_a, "partner"_a, "lam"_a, "out"_a,
             "num_threads"_a = py::none(), "Writes lam[i] own[i] + (1 - lam[i]) other[partner[i]] into out[i].");
  module.def("live_labels", &gradmix::py_live_labels, "labels"_a, "logits"_a, "masked"_a,
             "Whether each sample's label is a class whose logit is above `masked`.");
  module.def("off_linear", &gradmix::py_off_linear, "features"_a, "logits"_a, "weight"_a, "bias"_a, "step"_a, "tolerance"_a,
             "Whether the logits of any of every step-th sample are not weight times features plus bias.");
  module.def("residuals", &gradmix::py_residuals, "logits"_a, "labels"_a, "out"_a, "num_threads"_a = py::none(),
             "Writes softmax(logits) minus the one-hot labels into out.");
  module.def("all_finite", &gradmix::py_all_finite, "values"_a, "num_threads"_a = py::none(),
             "Whether none of several arrays (K,) holds a NaN or an infinity.");
  module.def("sketch_project", &gradmix::py_sketch_project, "x"_a, "key"_a, "ones"_a, "out"_a,
             "num_threads"_a = py::none(),
             "Writes x times the transposed random sign matrix of `key`, of as many rows as out's last axis has, into out.");
#if defined(GRADMIX_CUDA)
  gradmix::bind_cuda(module);
#endif
}
