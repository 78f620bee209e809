// A Python tensor as C++ sees it: pointer, element type, shape and strides, checked on arrival.
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
#include "dtype.hpp"

namespace gradmix {

const char* dtype_name(Dtype dtype);

// What else a tensor must be, or need not be.
struct Accept {
  bool writable = false;     // it must be
  bool any_strides = false;  // it need not be contiguous
  std::int32_t device_type = dlpack::kDeviceCpu;

  static Accept writing(std::int32_t device_type = dlpack::kDeviceCpu) { return {true, false, device_type}; }
  static Accept strided(std::int32_t device_type = dlpack::kDeviceCpu) { return {false, true, device_type}; }
  static Accept on(std::int32_t device_type) { return {false, false, device_type}; }
};

class TensorView {
 public:
  // Takes `object` over for as long as this view lives. `axes` names the axes expected, as in "(N, T, K)". A GPU is not
  // waited for: the caller orders the work by the stream it launches on.
  TensorView(const pybind11::object& object, const char* argument, std::initializer_list<Dtype> dtypes,
             const char* axes, std::int32_t ndim, const Accept& accept = {});
  ~TensorView();
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;

  const char* argument() const { return argument_; }
  Dtype dtype() const { return dtype_; }
  std::int32_t device_id() const { return device_id_; }  // the ordinal among devices of its type
  std::int64_t size(std::size_t axis) const { return shape_[axis]; }
  std::int64_t stride(std::size_t axis) const { return strides_[axis]; }  // in elements
  std::int64_t numel() const { return numel_; }
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
  void read(const dlpack::Tensor& tensor, std::initializer_list<Dtype> dtypes, const char* axes, std::int32_t ndim,
            const Accept& accept);

  const char* argument_;
  dlpack::ManagedTensor* managed_ = nullptr;
  dlpack::ManagedTensorVersioned* versioned_ = nullptr;
  void* data_ = nullptr;
  Dtype dtype_ = Dtype::kFloat32;
  std::int32_t device_id_ = 0;
  std::vector<std::int64_t> shape_;
  std::vector<std::int64_t> strides_;
  std::int64_t numel_ = 0;
  const char* begin_ = nullptr;  // the memory between the lowest element and the end of the highest
  const char* end_ = nullptr;
};

}  // namespace gradmix
