// The part of the DLPack C ABI that this extension reads: plain structs, laid out as the standard fixes them.
//
// Declared here rather than included, so that the build needs no header from anybody else. Both forms of the Python
// capsule are known: "dltensor" (before version 1) and "dltensor_versioned" (version 1).
#pragma once

#include <cstdint>

namespace gradmix::dlpack {

constexpr std::int32_t kDeviceCpu = 1;
constexpr std::int32_t kDeviceCuda = 2;

constexpr std::uint8_t kCodeInt = 0;
constexpr std::uint8_t kCodeUInt = 1;
constexpr std::uint8_t kCodeFloat = 2;
constexpr std::uint8_t kCodeBfloat = 4;
constexpr std::uint8_t kCodeComplex = 5;
constexpr std::uint8_t kCodeBool = 6;

constexpr std::uint64_t kFlagReadOnly = 1;
constexpr std::uint32_t kMajorVersion = 1;

constexpr const char* kCapsule = "dltensor";
constexpr const char* kCapsuleUsed = "used_dltensor";
constexpr const char* kCapsuleVersioned = "dltensor_versioned";
constexpr const char* kCapsuleVersionedUsed = "used_dltensor_versioned";

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: row-major and compact
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct ManagedTensorVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  std::uint64_t flags;
  Tensor tensor;
};

}  // namespace gradmix::dlpack
