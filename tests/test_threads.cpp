// How many threads a context takes where OpenMP gives fewer than there are cores.
#include <gtest/gtest.h>
#include <omp.h>

#include "optim/svd.h"
#include "tests/optim_golden.h"

namespace {
/// Every team has one thread, as with OMP_THREAD_LIMIT=1, which is read once, when a process starts.
class OneAtATime {
 public:
  OneAtATime() { omp_set_max_active_levels(0); }
  ~OneAtATime() { omp_set_max_active_levels(before_); }
  OneAtATime(const OneAtATime&) = delete;
  OneAtATime& operator=(const OneAtATime&) = delete;

 private:
  const int before_ = omp_get_max_active_levels();
};
}  // namespace

TEST(Threads, NoMoreThanThereWillBe) {
  const OneAtATime limit;
  CpuContext ctx(2);
  ASSERT_EQ(ctx.threads, 1);
  EXPECT_EQ(omp_get_max_threads(), 1);
  // OpenBLAS would wait here for a second thread.
  Matrix found = random_matrix(150, 200, 3), expected = found;
  svd_polar(ctx, found.tensor());
  CpuContext one(1);
  svd_polar(one, expected.tensor());
  EXPECT_EQ(found.data, expected.data);
}

TEST(Threads, NoMoreThanThereWillBeBesideAGpu) {
  if (!kHaveGpu) GTEST_SKIP() << "a program without CUDA";
  const OneAtATime limit;
  omp_set_num_threads(2);
  Context ctx;
  use_gpu(ctx, 0, DType::f32);
  EXPECT_EQ(ctx.threads, 1);
  EXPECT_EQ(omp_get_max_threads(), 1);
}

TEST(Threads, AsManyOnABusyMachine) {  // with OMP_DYNAMIC=true OpenMP gives what the load leaves
  omp_set_dynamic(1);
  const CpuContext ctx(2);
  EXPECT_EQ(omp_get_dynamic(), 0);
  omp_set_dynamic(0);
}
