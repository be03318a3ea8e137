// Where operations run and where their memory comes from.
//
// An operation X has a header X.h with the maths, an argument struct, `cpu::X` (X.cpp), `gpu::X` (X.cu) and a
// *door*: an inline function that checks shapes once and picks the device with ON_DEVICE. Only operation
// headers may use ON_DEVICE.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "model/kernels/profile.h"
#include "model/kernels/tensor.h"

#ifndef HAVE_GPU_KERNELS
#define HAVE_GPU_KERNELS 0
#endif

/// True when the .cu files are part of this binary. One value for the whole binary, set by the Makefile.
inline constexpr bool kHaveGpu = HAVE_GPU_KERNELS;

enum class Where : uint8_t { cpu, gpu };

/// Temporary memory of operations, handed out like a stack and reserved before step 1, so that a step never
/// allocates. Take a frame, take arrays from the frame; they are given back when the frame ends.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  /// Makes at least `bytes` available. Only while no frame is open.
  void reserve(int64_t bytes);
  int64_t capacity() const { return capacity_; }
  /// The most that was ever in use at once, in bytes.
  int64_t high_water() const { return high_water_; }

  class Frame {
   public:
    explicit Frame(Scratch& scratch) : scratch_(scratch), start_(scratch.used_) {}
    ~Frame() { scratch_.used_ = start_; }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;
    /// `count` floats, uninitialised, 64-byte aligned. Throws when the reserve is too small, naming the need.
    float* floats(int64_t count) { return static_cast<float*>(scratch_.take(count * 4)); }
    double* doubles(int64_t count) { return static_cast<double*>(scratch_.take(count * 8)); }
    Tensor tensor(Shape shape) { return {floats(shape.size()), shape}; }

   private:
    Scratch& scratch_;
    int64_t start_;
  };

 private:
  void* take(int64_t bytes);
  char* base_ = nullptr;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
  int64_t high_water_ = 0;
};

/// Everything an operation needs besides its arguments. Passed by reference everywhere; there is no global.
struct Context {
  Where where = Where::cpu;
  int threads = 1;  // OpenMP threads of one operation
  Scratch scratch;
  Profile* profile = nullptr;  // when set, every operation records its time there
  /// Names what the program does now, for the profile.
  void begin_phase(const char* name) {
    if (profile != nullptr) profile->begin_phase(name);
  }
};

/// Makes `ctx` run on the CPU. `threads` 0 means all the cores that this process may use.
void use_cpu(Context& ctx, int threads = 0);

/// A named block of memory planned first and taken in one piece: list tensors with add(), look at bytes(),
/// then allocate() once. Memory is zero-filled and 64-byte aligned.
class Arena {
 public:
  explicit Arena(std::string name) : name_(std::move(name)) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// Plans a tensor; `*tensor` has its shape now and its memory after allocate(). The pointer must stay
  /// valid.
  void add(Tensor* tensor, DType dtype, Shape shape);
  /// As above for float32.
  void add(Tensor* tensor, Shape shape) { add(tensor, DType::f32, shape); }
  void allocate(Context& ctx);

  const std::string& name() const { return name_; }
  int64_t bytes() const { return bytes_; }

 private:
  struct Entry {
    Tensor* tensor;
    int64_t offset;
  };
  std::string name_;
  std::vector<Entry> entries_;
  int64_t bytes_ = 0;
  void* base_ = nullptr;
};

/// The body of a door. `return` inside is meant: operations may return a value.
#define ON_DEVICE(op, ctx, ...)                                          \
  do {                                                                   \
    const OpTimer timer((ctx).profile, #op, work(__VA_ARGS__));          \
    if constexpr (kHaveGpu)                                              \
      if ((ctx).where == Where::gpu) return gpu::op((ctx), __VA_ARGS__); \
    return cpu::op((ctx), __VA_ARGS__);                                  \
  } while (0)
