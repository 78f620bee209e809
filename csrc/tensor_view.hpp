// A Python tensor as C++ sees it: pointer, element type and shape, checked on arrival.
//
// Anything with __dlpack__ and __dlpack_device__ is taken (torch, numpy, ...), without a copy. Every refusal names the
// argument, what came and what is expected: a wrong kind of object, device or element type is a TypeError, a wrong shape or
// layout a ValueError.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "dlpack_abi.hpp"

namespace gradmix {

enum class Dtype { kFloat16, kBfloat16, kFloat32, kFloat64, kInt64 };

const char* dtype_name(Dtype dtype);

class TensorView {
 public:
  // Takes `object` over for as long as this view lives. `axes` names the axes expected, as in "(N, T, K)".
  TensorView(const pybind11::object& object, const char* argument, std::initializer_list<Dtype> dtypes,
             const char* axes, std::int32_t ndim, bool writable = false);
  ~TensorView();
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;

  const char* argument() const { return argument_; }
  Dtype dtype() const { return dtype_; }
  std::int64_t size(std::size_t axis) const { return shape_[axis]; }
  std::int64_t numel() const { return numel_; }
  std::int64_t bytes() const;
  std::string shape_text() const;

  const void* data() const { return data_; }
  void* mutable_data() const { return data_; }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data_);
  }

  // ValueError unless the axis has `expected` entries; `meaning` says where the number comes from.
  void require_size(std::size_t axis, std::int64_t expected, const std::string& meaning) const;
  // ValueError if this tensor's memory overlaps `other`'s.
  void require_apart(const TensorView& other) const;

 private:
  void release() noexcept;
  void read(const dlpack::Tensor& tensor, std::initializer_list<Dtype> dtypes, const char* axes, std::int32_t ndim);

  const char* argument_;
  dlpack::ManagedTensor* managed_ = nullptr;
  dlpack::ManagedTensorVersioned* versioned_ = nullptr;
  void* data_ = nullptr;
  Dtype dtype_ = Dtype::kFloat32;
  std::vector<std::int64_t> shape_;
  std::int64_t numel_ = 0;
};

}  // namespace gradmix
