// Results that come later. Nothing that a kernel starts and must wait for is there before the wait, and what
// it will overwrite is poisoned at once: reading too early, and starting too early, both give NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace cuda_on_cpu {

/// NaN in every floating-point format, and an index that is out of every range.
inline constexpr int kPoisonByte = 0xff;

/// cp.async of one thread: copies, in committed groups, made when they are waited for.
class CopyQueue {
 public:
  /// `bytes` bytes will be written: `valid` of them from `from`, then zeros.
  void start(void* to_shared, const void* from, size_t bytes, size_t valid);
  void commit();
  /// Makes the copies of all but the newest `still_going` groups.
  void wait(size_t still_going);
  void clear();

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes, valid;
  };
  std::vector<Copy> copies_;
  std::vector<size_t> groups_;  // copies in each committed group
  size_t open_ = 0;             // copies since the last commit
};

/// wgmma of one thread: sums into registers, in committed groups, made when they are waited for.
class ProductQueue {
 public:
  using Accumulate = std::function<void(float* sums)>;

  /// `accumulate` will add to the `count` floats at `registers`, which hold NaN from now on.
  void start(float* registers, int count, Accumulate accumulate);
  void commit();
  /// Makes the sums of all but the newest `still_going` groups.
  void wait(size_t still_going);
  bool empty() const { return products_.empty(); }
  void clear();

  bool fenced = false;  // wgmma_fence was called

 private:
  struct Registers {
    float* at;
    std::vector<float> sums;
    int pending;
  };
  struct Product {
    float* registers;
    Accumulate accumulate;
  };
  Registers& find(float* registers);
  std::vector<Registers> registers_;
  std::vector<Product> products_;
  std::vector<size_t> groups_;
  size_t open_ = 0;
};

}  // namespace cuda_on_cpu
