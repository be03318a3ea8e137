#!/bin/sh
# tests/check.sh: the slow checks of `make check`. Each is one line of the summary; closes with "N passed, N failed".
set -u
passed=0 failed=0 skipped=0
jobs=$(nproc)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

check() {
  name=$1
  shift
  start=$(date +%s)
  "$@" >"$log" 2>&1
  case $? in
    0)
      passed=$((passed + 1))
      echo "ok      $name ($(($(date +%s) - start)) s)" ;;
    77)
      skipped=$((skipped + 1))
      echo "skipped $name: $(tail -n 1 "$log")" ;;
    *)
      failed=$((failed + 1))
      echo "FAILED  $name: $*"
      grep -E '^\[  FAILED  \]|: Failure$' "$log" | sort -u | head -n 20 # of all processes; the end is the last one's
      tail -n 60 "$log" ;;
  esac
}

# Address and undefined-behaviour sanitizers over all tests and the fuzzer; with the executor that is a memcheck of every
# CUDA half. One thread order is enough to see a bad address. The BLAS of LAPACK is not ours; leaks are checked.
# The tests' own .cpp files go without them, which halves the build: what the program does to their memory is seen all the
# same.
sanitize='-fsanitize=address,undefined -fno-sanitize-recover=all'
sanitized() {
  make -j"$jobs" DEVICE=sim BUILD=build/asan TESTS_FROM=build/sim OPT='-O1 -march=native' EXTRA="$sanitize" \
    build/asan/train_gpt build/asan/tests/all build/asan/tests/fuzz_files
}
# The thread sanitizer over the executor is a racecheck of the CUDA halves: missing barriers, with both source lines. It is
# slow, so small cases of every operation; and OpenMP's own threads would be misread, so one of them.
racecheck_build() {
  make -j"$jobs" DEVICE=sim BUILD=build/tsan TESTS_FROM=build/sim OPT='-O1 -march=native' EXTRA=-fsanitize=thread \
    LIB_SOURCES="$(ls model/kernels/*.cpp optim/update.cpp optim/lines.cpp optim/unit_lines.cpp optim/escape_sums.cpp optim/hyperball.cpp \
      optim/qk_clip.cpp keyed.cpp json_text.cpp files.cpp model/parameters.cpp model/config.cpp world/*.cpp dev/cuda_on_cpu/*.cpp model/kernels/*.cu optim/*.cu |
      grep -v cublaslt | tr '\n' ' ')" \
    TEST_SHARED='tests/op_cases.cpp tests/op_run.cpp tests/attention_oracle.cpp' \
    TEST_SOURCES="tests/test_executor_races.cu tests/test_wrappers.cu tests/test_hopper.cu dev/lab/gemm_wgmma.cu
      tests/test_gpu_ops.cpp tests/test_gpu_attention.cpp tests/test_comm.cpp" build/tsan/tests/all
}
# The contract of the communicator between two processes: its thread against the caller's. OpenMPI takes two locks of its own
# in both orders, in one thread.
comm_races() {
  command -v mpirun >/dev/null || { echo 'mpirun is not installed (openmpi-bin)'; return 77; }
  env OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 CUDA_ON_CPU_THREADS=1 \
    TSAN_OPTIONS='detect_deadlocks=0 atexit_sleep_ms=0' mpirun --quiet --oversubscribe --mca btl self,vader -np 2 \
    build/tsan/tests/all --gtest_filter='On/Comms.*'
}
# Half a minute in all, shared by the cores.
fuzz() {
  processes=
  for seed in $(seq "$jobs"); do
    build/asan/tests/fuzz_files $(((29 + jobs) / jobs)) "$seed" &
    processes="$processes $!"
  done
  for process in $processes; do wait "$process" || return 1; done
}
races='ExecutorRaces.*:Wrappers.*:Hopper.*:GpuBf16.*:GpuF32.*T=3,C=16*:GpuF32.line_*rows=7,*:GpuAttention.NanInTheGradient*'
too_large='*T=11,C=*:*T=4150*:*rows=700*:*C=1032*:*C=6152*'
# Eight steps of one rule through the CUDA path see as much of memory as those of seven.
repeats='*Trajectories*accum2Gpu:*Trajectories*clipGpu:*Trajectories*signsgdGpu:*Trajectories*svdGpu:*Trajectories*modularGpu'
# Long runs of the same code as the tests of single rules and norms.
long_runs='*MeasuredStepsHaveTheSameBits/Gpu:ShampooInModels.*:GpuOptimizer.NonFinite*:Escape.Resumes*:*ProgramNorms*:QkClipOnGpu*'
long_runs="$long_runs:Escape.GoldenRatio*:*ValuesOfLargerMatricesAreClose/Gpu"
check 'the program without CUDA' env TRAIN_GPT="$PWD/build/cpu/train_gpt" tests/gtest.sh build/sim/tests/all \
  --gtest_filter='Program.*:ProgramRanks.*-*Kill*'
check 'the program without MPI' tests/check_without_mpi.sh
check 'build with sanitizers' sanitized
check 'tests under address and undefined-behaviour sanitizers' env CUDA_ON_CPU_STREAMS=random:1 CUDA_ON_CPU_ROUNDING=gpu:1 ORDERS=1 \
  tests/gtest.sh build/asan/tests/all \
  --gtest_filter="-Program*:$repeats:$long_runs"
# That the two devices agree is shown without sanitizers; resuming takes the same path here. MPI's own leaks would be found.
check 'the program under sanitizers' env CUDA_ON_CPU_STREAMS=random:1 ORDERS=1 TRAIN_GPT="$PWD/build/asan/train_gpt" \
  TRAIN_GPT_GPU="$PWD/build/asan/train_gpt" tests/gtest.sh build/asan/tests/all --gtest_filter='Program*-*Kill*:ProgramOnGpu.TrainsAs*:ProgramRanks*:ProgramOverNccl*'
check 'ranks over NCCL under sanitizers' env ASAN_OPTIONS=detect_leaks=0 CUDA_ON_CPU_STREAMS=random:1 CUDA_ON_CPU_THREADS=1 \
  TRAIN_GPT="$PWD/build/asan/train_gpt" TRAIN_GPT_GPU="$PWD/build/asan/train_gpt" \
  build/asan/tests/all --gtest_filter='ProgramOverNccl.RanksThatMpi*'
check 'build for the race check' racecheck_build
check 'races in the CUDA halves' env CUDA_ON_CPU_STREAMS=random:2 OMP_NUM_THREADS=1 ORDERS=1 TSAN_OPTIONS=atexit_sleep_ms=0 tests/gtest.sh build/tsan/tests/all \
  --gtest_filter="$races-$too_large"
check 'races between the threads of two processes' comm_races
check 'nvcc for sm_80 and sm_90a: registers, no spills' env OPT=-O0 tests/check_ptxas.sh build/ptxas
check 'the program for GPUs where nothing of CUDA is' env OPT=-O0 tests/check_cuda_start.sh build/ptxas
check 'gpu-check in the executor' dev/gpu_check.sh --self-test --out build/gpu-check-self-test
check 'fuzzing shards, safetensors, JSON and options' fuzz
check 'kill -9 at 60 random moments' env KILLS=60 TRAIN_GPT="$PWD/build/cpu/train_gpt" \
  build/sim/tests/all --gtest_filter='Program.KillAtRandomMoments*'
check 'all experiments of make anthology, tiny' sh -c \
  'rm -rf build/anthology && exec python3 dev/anthology/anthology.py --quick --corpus none --out build/anthology'
check 'format and lint' make lint LINT=program

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
