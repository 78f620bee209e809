#include "tensor_view.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

namespace py = pybind11;

namespace gradmix {
namespace {

[[noreturn]] void refuse_type(const std::string& argument, const std::string& came, const std::string& expected) {
  throw py::type_error(argument + ": got " + came + ", expected " + expected);
}

[[noreturn]] void refuse_value(const std::string& argument, const std::string& came, const std::string& expected) {
  throw py::value_error(argument + ": got " + came + ", expected " + expected);
}

std::string python_type(const py::object& object) { return py::str(py::type::of(object).attr("__name__")); }

std::string dlpack_dtype_name(const dlpack::DataType& type) {
  std::string name;
  switch (type.code) {
    case dlpack::kCodeInt: name = "int"; break;
    case dlpack::kCodeUInt: name = "uint"; break;
    case dlpack::kCodeFloat: name = "float"; break;
    case dlpack::kCodeBfloat: name = "bfloat"; break;
    case dlpack::kCodeComplex: name = "complex"; break;
    case dlpack::kCodeBool: return "bool";
    default: return "DLPack type code " + std::to_string(type.code);
  }
  name += std::to_string(type.bits);
  return type.lanes == 1 ? name : name + "x" + std::to_string(type.lanes);
}

bool matches(const dlpack::DataType& type, Dtype dtype) {
  if (type.lanes != 1) return false;
  switch (dtype) {
    case Dtype::kFloat16: return type.code == dlpack::kCodeFloat && type.bits == 16;
    case Dtype::kBfloat16: return type.code == dlpack::kCodeBfloat && type.bits == 16;
    case Dtype::kFloat32: return type.code == dlpack::kCodeFloat && type.bits == 32;
    case Dtype::kFloat64: return type.code == dlpack::kCodeFloat && type.bits == 64;
    case Dtype::kInt64: return type.code == dlpack::kCodeInt && type.bits == 64;
    case Dtype::kUint8: return type.code == dlpack::kCodeUInt && type.bits == 8;
  }
  return false;
}

std::int64_t itemsize(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
    case Dtype::kBfloat16: return 2;
    case Dtype::kFloat32: return 4;
    case Dtype::kUint8: return 1;
    default: return 8;
  }
}

std::string device_text(std::int32_t type) {
  const std::string number = "(type " + std::to_string(type) + ")";
  return type == dlpack::kDeviceCuda ? "a CUDA tensor " + number : "a CPU tensor " + number;
}

std::string tuple_text(const std::int64_t* values, std::int32_t count) {
  std::string text = "(";
  for (std::int32_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + (count == 1 ? ",)" : ")");
}

// The DLPack capsule of a tensor; a capsule is taken as it is.
py::object export_capsule(const py::object& object, const char* argument, std::int32_t device_type) {
  if (PyCapsule_CheckExact(object.ptr())) return object;
  if (!py::hasattr(object, "__dlpack__") || !py::hasattr(object, "__dlpack_device__")) {
    refuse_type(argument, python_type(object), "a tensor with __dlpack__ and __dlpack_device__");
  }
  try {
    // The device is asked for first: exporting a tensor of another device may synchronise or fail obscurely.
    const auto device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    if (device.first != device_type) {
      refuse_type(argument, "a tensor of DLPack device type " + std::to_string(device.first),
                  device_text(device_type));
    }
    if (device_type == dlpack::kDeviceCpu) return object.attr("__dlpack__")();
    return object.attr("__dlpack__")(py::arg("stream") = -1);  // -1: no synchronisation
  } catch (const py::cast_error&) {
    refuse_type(argument, python_type(object) + " with an odd __dlpack_device__", "a pair (device type, device id)");
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // KeyboardInterrupt and the like pass
    const std::string why = py::str(error.value());
    refuse_type(argument, python_type(object) + " that cannot be exported by DLPack (" + why + ")",
                "a tensor that can, without gradient tracking");
  }
}

}  // namespace

const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16: return "float16";
    case Dtype::kBfloat16: return "bfloat16";
    case Dtype::kFloat32: return "float32";
    case Dtype::kFloat64: return "float64";
    case Dtype::kInt64: return "int64";
    case Dtype::kUint8: return "uint8";
  }
  return "?";
}

TensorView::TensorView(const py::object& object, const char* argument, std::initializer_list<Dtype> dtypes,
                       const char* axes, std::int32_t ndim, const Accept& accept)
    : argument_(argument) {
  const py::object capsule = export_capsule(object, argument, accept.device_type);
  PyObject* const raw = capsule.ptr();
  const dlpack::Tensor* tensor = nullptr;
  bool read_only = false;
  if (PyCapsule_IsValid(raw, dlpack::kCapsule)) {
    managed_ = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(raw, dlpack::kCapsule));
    PyCapsule_SetName(raw, dlpack::kCapsuleUsed);  // from here on its memory is ours to release
    tensor = &managed_->tensor;
  } else if (PyCapsule_IsValid(raw, dlpack::kCapsuleVersioned)) {
    auto* const versioned =
        static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(raw, dlpack::kCapsuleVersioned));
    if (versioned->version.major != dlpack::kMajorVersion) {
      refuse_type(argument, "a DLPack capsule of version " + std::to_string(versioned->version.major), "version 1");
    }
    versioned_ = versioned;
    PyCapsule_SetName(raw, dlpack::kCapsuleVersionedUsed);
    tensor = &versioned->tensor;
    read_only = (versioned->flags & dlpack::kFlagReadOnly) != 0;
  } else {
    refuse_type(argument, python_type(capsule) + " from __dlpack__", "an unused DLPack capsule");
  }

  try {
    read(*tensor, dtypes, axes, ndim, accept);
    if (accept.writable && read_only) refuse_value(argument, "a read-only tensor", "a writable one");
  } catch (...) {
    release();  // a constructor that throws gets no destructor call
    throw;
  }
}

void TensorView::read(const dlpack::Tensor& tensor, std::initializer_list<Dtype> dtypes, const char* axes,
                      std::int32_t ndim, const Accept& accept) {
  if (tensor.device.type != accept.device_type) {
    refuse_type(argument_, "a tensor of DLPack device type " + std::to_string(tensor.device.type),
                device_text(accept.device_type));
  }
  device_id_ = tensor.device.id;
  bool known = false;
  std::string expected;
  for (const Dtype dtype : dtypes) {
    if (matches(tensor.dtype, dtype)) {
      dtype_ = dtype;
      known = true;
    }
    expected += (expected.empty() ? "" : ", ") + std::string(dtype_name(dtype));
  }
  if (!known) refuse_type(argument_, "dtype " + dlpack_dtype_name(tensor.dtype), expected);
  if (tensor.ndim != ndim) {
    refuse_value(argument_, "shape " + tuple_text(tensor.shape, tensor.ndim), std::string("shape ") + axes);
  }
  shape_.assign(tensor.shape, tensor.shape + ndim);
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  // Axes without entries do not make the others' product harmless: kernels multiply some of them.
  std::int64_t bytes = itemsize(dtype_);
  bool empty = false;
  for (const std::int64_t size : shape_) {
    if (size < 0) refuse_value(argument_, "shape " + shape_text(), "sizes of at least 0");
    empty = empty || size == 0;
    if (size > 1 && bytes > most / size) {
      refuse_value(argument_, "shape " + shape_text(), "a product of sizes that memory can be addressed by");
    }
    bytes *= std::max<std::int64_t>(size, 1);
  }
  numel_ = empty ? 0 : bytes / itemsize(dtype_);
  strides_.resize(shape_.size());
  std::int64_t compact = 1;
  std::int64_t lowest = 0, highest = 0;
  for (std::int32_t axis = ndim - 1; axis >= 0; --axis) {
    // The stride of an axis of one entry, or of a tensor without entries, may be anything and is never used.
    const bool given = tensor.strides != nullptr && numel_ > 0 && shape_[axis] != 1;
    const std::int64_t stride = given ? tensor.strides[axis] : compact;
    if (stride != compact && !accept.any_strides) {
      refuse_value(argument_, "strides " + tuple_text(tensor.strides, ndim) + " for shape " + shape_text(),
                   "a contiguous tensor");
    }
    strides_[axis] = stride;
    compact *= shape_[axis];
    if (numel_ == 0) continue;
    // A quarter of the range for each of three axes, so that their sum and the last element stay within it.
    const std::int64_t reach = most / itemsize(dtype_) / 4, steps = shape_[axis] - 1;
    if (steps > 0 && (stride > reach / steps || stride < -(reach / steps))) {
      refuse_value(argument_, "strides " + tuple_text(tensor.strides, ndim) + " for shape " + shape_text(),
                   "strides that memory can be addressed by");
    }
    (stride < 0 ? lowest : highest) += stride * steps;
  }
  if (numel_ > 0 && tensor.data == nullptr) refuse_value(argument_, "a tensor without memory", "one with its data");
  data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
  if (numel_ > 0) {
    begin_ = static_cast<const char*>(data_) + lowest * itemsize(dtype_);
    end_ = static_cast<const char*>(data_) + (highest + 1) * itemsize(dtype_);
  }
  if (numel_ > 0 && reinterpret_cast<std::uintptr_t>(data_) % static_cast<std::uintptr_t>(itemsize(dtype_)) != 0) {
    refuse_value(argument_, "memory that is not aligned to its elements", "aligned memory");
  }
}

TensorView::~TensorView() { release(); }

void TensorView::release() noexcept {
  if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
  if (versioned_ != nullptr && versioned_->deleter != nullptr) versioned_->deleter(versioned_);
  managed_ = nullptr;
  versioned_ = nullptr;
}

std::string TensorView::shape_text() const { return tuple_text(shape_.data(), static_cast<std::int32_t>(shape_.size())); }

void TensorView::require_size(std::size_t axis, std::int64_t expected, const std::string& meaning) const {
  if (shape_[axis] == expected) return;
  refuse_value(argument_, "shape " + shape_text(),
               std::to_string(expected) + " in axis " + std::to_string(axis) + " (" + meaning + ")");
}

void TensorView::require_apart(const TensorView& other) const {
  if (numel_ == 0 || other.numel_ == 0) return;
  const std::less<const char*> before;
  if (before(begin_, other.end_) && before(other.begin_, end_)) {
    refuse_value(argument_, std::string("memory shared with ") + other.argument_, "memory of its own");
  }
}

}  // namespace gradmix
