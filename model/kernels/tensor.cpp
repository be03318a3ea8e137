#include "model/kernels/tensor.h"

int64_t dtype_bytes(DType dtype) {
  return dtype == DType::bf16 ? 2 : dtype == DType::f64 ? 8 : 4;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::i32:
      return "i32";
    case DType::f64:
      return "f64";
  }
  return "?";
}

Shape::Shape(std::initializer_list<int64_t> dims) {
  if (dims.size() > dims_.size()) throw ShapeError("Shape: at most four dimensions");
  for (int64_t dim : dims) {
    if (dim < 0) throw ShapeError("Shape: a dimension is negative");
    dims_[static_cast<size_t>(rank_++)] = dim;
  }
}

int64_t Shape::size() const {
  int64_t size = 1;
  for (int i = 0; i < rank_; ++i) size *= dims_[static_cast<size_t>(i)];
  return size;
}

std::string Shape::str() const {
  std::string text = "(";
  for (int i = 0; i < rank_; ++i) text += (i > 0 ? ", " : "") + std::to_string(dims_[static_cast<size_t>(i)]);
  return text + ")";
}

namespace {
void* typed(const Tensor& tensor, DType dtype) {
  if (tensor.dtype != dtype) throw ShapeError("tensor " + tensor.str() + " used as " + dtype_name(dtype));
  return tensor.data;
}
}  // namespace

float* Tensor::f32() const {
  return static_cast<float*>(typed(*this, DType::f32));
}
int32_t* Tensor::i32() const {
  return static_cast<int32_t*>(typed(*this, DType::i32));
}
double* Tensor::f64() const {
  return static_cast<double*>(typed(*this, DType::f64));
}
Bf16* Tensor::bf16() const {
  return static_cast<Bf16*>(typed(*this, DType::bf16));
}

Tensor Tensor::view(Shape as) const {
  if (as.size() != size()) throw ShapeError("cannot view " + str() + " as " + as.str());
  return {data, dtype, as};
}

namespace {
/// The shape without its first dimension.
Shape tail(const Shape& shape) {
  switch (shape.rank()) {
    case 2:
      return {shape[1]};
    case 3:
      return {shape[1], shape[2]};
    case 4:
      return {shape[1], shape[2], shape[3]};
    default:
      return {};
  }
}

Shape prepend(int64_t first, const Shape& rest) {
  switch (rest.rank()) {
    case 1:
      return {first, rest[0]};
    case 2:
      return {first, rest[0], rest[1]};
    case 3:
      return {first, rest[0], rest[1], rest[2]};
    default:
      return {first};
  }
}
}  // namespace

Tensor Tensor::slice(int64_t start, int64_t count) const {
  if (shape.rank() == 0 || start < 0 || count < 0 || start + count > shape[0])
    throw ShapeError("slice [" + std::to_string(start) + ", +" + std::to_string(count) + ") of " + str());
  const Shape rest = tail(shape);
  char* base = static_cast<char*>(data);
  return {base + start * rest.size() * dtype_bytes(dtype), dtype, prepend(count, rest)};
}

Tensor Tensor::operator[](int64_t i) const {
  const Tensor one = slice(i, 1);
  return {one.data, dtype, tail(shape)};
}

void expect(bool ok, const char* message) {
  if (!ok) throw ShapeError(message);
}

void expect_shape(const Tensor& tensor, const Shape& shape, const char* what) {
  if (!tensor) throw ShapeError(std::string(what) + ": missing, need " + shape.str());
  if (tensor.shape != shape)
    throw ShapeError(std::string(what) + ": got " + tensor.str() + ", need " + shape.str());
}
