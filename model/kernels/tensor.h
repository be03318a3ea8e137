// A tensor is a view: a pointer, a dtype and a shape. It never owns memory (arenas do, see context.h).
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <stdexcept>
#include <string>

enum class DType : uint8_t { f32, bf16, i32, f64 };

/// A bfloat16 in host memory: the upper half of a float32. Host code stores and converts it, nothing else.
struct Bf16 {
  uint16_t bits;
};
/// Rounds to nearest, ties to even; a NaN stays one.
inline Bf16 to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline float to_float(Bf16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}

/// Bytes of one element.
int64_t dtype_bytes(DType dtype);
const char* dtype_name(DType dtype);

/// Up to four dimensions, row-major, contiguous.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims);

  int rank() const { return rank_; }
  int64_t operator[](int i) const { return dims_[static_cast<size_t>(i)]; }
  /// Number of elements; 1 for a scalar (rank 0).
  int64_t size() const;
  /// Product of all dimensions but the last: the rows of the tensor seen as a matrix.
  int64_t rows() const { return rank_ == 0 ? 1 : size() / cols(); }
  /// The last dimension.
  int64_t cols() const { return rank_ == 0 ? 1 : dims_[static_cast<size_t>(rank_ - 1)]; }
  bool operator==(const Shape&) const = default;
  /// "(4, 64, 768)"
  std::string str() const;

 private:
  std::array<int64_t, 4> dims_{};
  int rank_ = 0;
};

/// Raised when a caller breaks an operation's contract: a bug in the program, or a size that the user chose.
struct ShapeError : std::logic_error {
  using std::logic_error::logic_error;
};

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;

  Tensor() = default;
  Tensor(void* data, DType dtype, Shape shape) : data(data), dtype(dtype), shape(shape) {}
  /// A float32 view of memory that somebody else owns.
  Tensor(float* data, Shape shape) : Tensor(data, DType::f32, shape) {}
  Tensor(int32_t* data, Shape shape) : Tensor(data, DType::i32, shape) {}
  Tensor(double* data, Shape shape) : Tensor(data, DType::f64, shape) {}
  Tensor(Bf16* data, Shape shape) : Tensor(data, DType::bf16, shape) {}

  explicit operator bool() const { return data != nullptr; }
  int64_t size() const { return shape.size(); }
  int64_t rows() const { return shape.rows(); }
  int64_t cols() const { return shape.cols(); }
  int64_t bytes() const { return size() * dtype_bytes(dtype); }

  /// Typed access; throws ShapeError when the dtype is another one.
  float* f32() const;
  int32_t* i32() const;
  double* f64() const;
  Bf16* bf16() const;
  std::span<float> floats() const { return {f32(), static_cast<size_t>(size())}; }

  /// The same memory under another shape with the same number of elements.
  Tensor view(Shape as) const;
  /// `count` entries along the first dimension from `start`: (N, ...) -> (count, ...).
  Tensor slice(int64_t start, int64_t count) const;
  /// Entry i along the first dimension, that dimension dropped: (N, a, b) -> (a, b).
  Tensor operator[](int64_t i) const;
  /// "f32 (4, 64, 768)"
  std::string str() const { return std::string(dtype_name(dtype)) + " " + shape.str(); }
};

/// Throws ShapeError with `message` unless `ok`. Messages: "<op>: <what>, got <x>, need <y>".
void expect(bool ok, const char* message);
/// Throws "<what>: got f32 (4, 64), need (4, 32)" unless the tensor is present and has this shape.
void expect_shape(const Tensor& tensor, const Shape& shape, const char* what);
