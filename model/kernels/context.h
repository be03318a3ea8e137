// Where operations run and where their memory comes from.
//
// An operation X has a header X.h with the maths, an argument struct, `cpu::X` (X.cpp), `gpu::X` (X.cu) and a
// *door*: an inline function that checks shapes once and picks the device with ON_DEVICE. Only operation
// headers may use ON_DEVICE.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/kernels/comm.h"
#include "model/kernels/profile.h"
#include "model/kernels/tensor.h"

#ifndef HAVE_GPU_KERNELS
#define HAVE_GPU_KERNELS 0
#endif

/// True when the .cu files are part of this binary. One value for the whole binary, set by the Makefile.
inline constexpr bool kHaveGpu = HAVE_GPU_KERNELS;

enum class Where : uint8_t { cpu, gpu };

struct Context;

/// What the program asks of a GPU outside of operations. Defined in context.cu: only binaries with CUDA have
/// it, so every call stands behind `if constexpr (kHaveGpu)`. Failures are std::runtime_error with file, line
/// and hint.
namespace gpu {
/// One GPU with its streams, its matrix-product plans and its scratch: cuda.h.
struct Device;

/// What a person or a plan wants to know of a GPU.
struct DeviceInfo {
  std::string name;      // "NVIDIA H200"
  int64_t memory_bytes;  // all of it
  int64_t free_bytes;    // now
  int multiprocessors;
  int compute_capability;  // 90 for 9.0
};

/// GPUs that this process may use; 0 without a driver. The executor of dev/cuda_on_cpu does not count as one.
int count();
std::shared_ptr<Device> open(int index);
DeviceInfo info(Device& device);
/// Zero-filled, aligned to 256 bytes.
char* allocate(Device& device, int64_t bytes, const char* what);
void release(Device& device, char* block);
/// Page-locked host memory, which copies that nobody waits for need.
char* allocate_pinned(Device& device, int64_t bytes);
void release_pinned(Device& device, char* block);
/// Copies that wait until all work enqueued before them, and they themselves, are done.
void copy_in(Device& device, void* to, const void* from_host, int64_t bytes);
void copy_out(Device& device, void* to_host, const void* from, int64_t bytes);
void synchronize(Device& device);
/// A named range on the timeline of Nsight Systems (NVTX), around the host calls that enqueue work.
void begin_range(const char* name);
void end_range();
}  // namespace gpu

/// One zero-filled block of memory where a context computes; given back with the object.
class Memory {
 public:
  Memory() = default;
  /// `what` is for the message when there is not enough.
  Memory(const Context& ctx, int64_t bytes, const char* what);
  ~Memory();
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept;

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
  std::shared_ptr<gpu::Device> device_;  // null: host memory
};

/// Arrays in arenas and scratch begin at multiples of this many bytes: a cache line and an AVX-512 register
/// on the host; whole memory transactions, TMA and cuBLASLt's fast kernels on a GPU.
inline constexpr int64_t kAlign = 256;

/// Temporary memory of operations, handed out like a stack and reserved before step 1, so that a step never
/// allocates. Take a frame, take arrays from the frame; they are given back when the frame ends.
class Scratch {
 public:
  explicit Scratch(const Context& ctx) : ctx_(ctx) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  /// Makes at least `bytes` available, and room for rounding each of up to kMostArrays arrays up to kAlign.
  /// Only while no frame is open.
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
    /// `count` floats, uninitialised, aligned to kAlign. Throws when the reserve is too small, naming the
    /// need.
    float* floats(int64_t count) { return static_cast<float*>(scratch_.take(count * 4)); }
    double* doubles(int64_t count) { return static_cast<double*>(scratch_.take(count * 8)); }
    Tensor tensor(Shape shape, DType dtype = DType::f32) {
      return {scratch_.take(shape.size() * dtype_bytes(dtype)), dtype, shape};
    }

   private:
    Scratch& scratch_;
    int64_t start_;
  };

 private:
  static constexpr int64_t kMostArrays = 32;
  void* take(int64_t bytes);
  const Context& ctx_;
  Memory memory_;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
  int64_t high_water_ = 0;
};

/// Everything an operation needs besides its arguments. Passed by reference everywhere; there is no global.
struct Context {
  Where where = Where::cpu;
  DType dtype = DType::f32;             // of activations, and of the weights that matrix products read
  int threads = 1;                      // OpenMP threads of one operation
  std::shared_ptr<gpu::Device> device;  // null on the CPU
  Scratch scratch{*this};
  std::shared_ptr<Comm> comm = std::make_shared<Comm>();  // the other ranks; by default there are none
  Profile* profile = nullptr;                             // when set, every operation records its time there
  /// Waits until all enqueued work is done.
  void synchronize() {
    if constexpr (kHaveGpu)
      if (device) gpu::synchronize(*device);
  }
  /// Names what the program does now, for the profile.
  void begin_phase(const char* name) {
    if (profile != nullptr) profile->begin_phase(name);
  }
};

/// How many threads OpenMP gives the calling thread where it asks for `wanted`: limits of the user or the
/// machine (OMP_THREAD_LIMIT, OMP_MAX_ACTIVE_LEVELS) may allow fewer. From now on it gets that many, each
/// time, also for oneDNN and LAPACK, which ask by themselves and, given fewer than they asked for, wait for
/// ever or compute with what nobody has written.
int use_threads(int wanted);
/// Makes `ctx` run on the CPU. `threads` 0 means all the cores that this process may use; use_threads().
void use_cpu(Context& ctx, int threads = 0);
/// Makes `ctx` run on GPU `index` with activations in `dtype` (f32 or bf16), and what stays on the host, as
/// initial values and LAPACK, on all cores. Throws std::runtime_error when this binary, machine or GPU
/// cannot.
void use_gpu(Context& ctx, int index, DType dtype);

/// A tensor within reach of host code: itself on the CPU, a host copy of it on a GPU.
class OnHost {
 public:
  /// Brings the values here, waiting for the work that makes them; with `load` false they are undefined.
  OnHost(Context& ctx, const Tensor& tensor, bool load = true) : OnHost(&ctx, tensor, load) {}
  /// As above; a null context means memory of the host.
  OnHost(Context* ctx, const Tensor& tensor, bool load = true);
  const Tensor& operator*() const { return here_; }
  const Tensor* operator->() const { return &here_; }
  /// Takes what was written here back to where the tensor lives.
  void store();

 private:
  Context* ctx_;
  Tensor there_, here_;
  std::vector<std::byte> copy_;
};

/// A named block of memory planned first and taken in one piece: list tensors with add(), look at bytes(),
/// then allocate() once. Memory is zero-filled and aligned to kAlign.
///
/// Arrays that a pass reads side by side should begin at different places of a page. A CPU that looks for a
/// line in its first cache compares a few bits that it has made of the address: of arrays a multiple of 256
/// MiB apart, lines at one place of a page throw each other out, and a step of Adam took up to twice as
/// long, in some processes and not in others, as the kernel had placed their blocks (dev/results/rules.md).
class Arena {
 public:
  static constexpr int64_t kPlaces = 16;  // of a page, kAlign apart

  /// The first tensor begins at `place` of a page.
  explicit Arena(std::string name, int64_t place = 0) : name_(std::move(name)), bytes_(place * kAlign) {}
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// Plans a tensor; `*tensor` has its shape now and its memory after allocate(). The pointer must stay
  /// valid.
  void add(Tensor* tensor, DType dtype, Shape shape);
  /// As above for float32.
  void add(Tensor* tensor, Shape shape) { add(tensor, DType::f32, shape); }
  /// The next tensor begins at this place of a page, modulo kPlaces; others follow without a gap.
  void move_to(int64_t place);
  void allocate(Context& ctx);

  const std::string& name() const { return name_; }
  int64_t bytes() const { return entries_.empty() ? 0 : bytes_; }

 private:
  struct Entry {
    Tensor* tensor;
    int64_t offset;
  };
  std::string name_;
  std::vector<Entry> entries_;
  int64_t bytes_;
  Memory memory_;
};

/// Times its own life as one call of `op`, and names it on a GPU's timeline. With a profile, work on a GPU is
/// waited for at both ends; without one nothing waits.
class OpTimer {
 public:
  OpTimer(Context& ctx, const char* op, const Work& work) : ctx_(ctx), op_(op), work_(work) {
    if constexpr (kHaveGpu)
      if (ctx.device) gpu::begin_range(op);
    if (ctx.profile != nullptr) begin();
  }
  ~OpTimer() {
    if (ctx_.profile != nullptr) end();
    if constexpr (kHaveGpu)
      if (ctx_.device) gpu::end_range();
  }
  OpTimer(const OpTimer&) = delete;
  OpTimer& operator=(const OpTimer&) = delete;

 private:
  void begin();
  void end();
  Context& ctx_;
  const char* op_;
  Work work_;
  double outer_inner_ = 0;  // what Profile::inner was for the call around this one
  Profile::Clock::time_point start_;
};

/// The body of a door. `return` inside is meant: operations may return a value.
#define ON_DEVICE(op, ctx, ...)                                          \
  do {                                                                   \
    const OpTimer timer((ctx), #op, work(__VA_ARGS__));                  \
    if constexpr (kHaveGpu)                                              \
      if ((ctx).where == Where::gpu) return gpu::op((ctx), __VA_ARGS__); \
    return cpu::op((ctx), __VA_ARGS__);                                  \
  } while (0)
