#!/bin/sh
# tests/test_ranks.sh: what needs several processes, under mpirun: the contract of the communicator on 1, 2, 3, 4 and 8 ranks,
# and jobs that fail. BUILD: where tests/all is, of a build with MPI. Exit status 77 without mpirun.
set -u
cd "$(dirname "$0")/.." || exit 1
build=${BUILD:-build/sim}
tests=$build/tests/all
command -v mpirun >/dev/null 2>&1 || { echo 'mpirun is not installed (openmpi-bin): no test with several processes'; exit 77; }
grep -q '^1' "$build/backends" || { echo "$build was made without MPI: no test with several processes"; exit 77; }
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 CUDA_ON_CPU_THREADS=1 CUDA_ON_CPU_STREAMS=late
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
log=$folder/log
bad=0

# ranks N FILTER [ARGUMENTS]: mpirun's status is 0 when that of every rank is.
ranks() {
  n=$1 filter=$2
  shift 2
  timeout 60 mpirun --quiet --oversubscribe --tag-output -np "$n" "$tests" --gtest_color=no --gtest_filter="$filter" "$@" \
    >"$log" 2>&1
}
failed() {
  echo "tests/test_ranks.sh: $1"
  grep -v '\[ RUN  \|\[       OK\|\[---\|\[===\|:Running main\|:Note: \|>:$' "$log" | head -n 100
  bad=1
}

for n in 1 2 3 4 8; do
  ranks "$n" 'On/Comms.*' || failed "the contract on $n ranks: status $?"
  passed=$(grep -c '\[  PASSED  \] [1-9]' "$log")
  [ "$passed" -eq "$n" ] || failed "the contract on $n ranks: $passed of them passed"
done

# The same over NCCL, the executor's own in a build for it: each rank has a GPU of its own.
over_nccl() { (export RANKS_OVER_NCCL=1 CUDA_ON_CPU_DEVICES=8; "$@"); }
if [ "${build##*/}" = sim ]; then
  for n in 2 3 4 8; do
    over_nccl ranks "$n" 'On/Comms.*Gpu' || failed "the contract on $n ranks over NCCL: status $?"
    passed=$(grep -c '\[  PASSED  \] [1-9]' "$log")
    [ "$passed" -eq "$n" ] || failed "the contract on $n ranks over NCCL: $passed of them passed"
  done
  over_nccl ranks 2 'CommFailures.DISABLED_AGpuThatWaits*' --gtest_also_run_disabled_tests || failed "a wait in NCCL: status $?"
  grep -q '\[  PASSED  \] 1 test' "$log" || failed 'a wait in NCCL'
fi

ranks 3 'Worlds.DISABLED_*' --gtest_also_run_disabled_tests || failed "ranks of mpirun that join: status $?"

# Every rank that is left must see the failure and leave, and mpirun must end the one that hangs, and report it. These
# jobs mostly wait: at the same time.
failures='AWatchEndsTheWaitForARankThatHangs AnExceptionDropsWhatIsUnderWay RanksThatDoNotDoTheSameAreTold'
for test in $failures; do
  (
    log=$folder/$test
    ranks 2 "CommFailures.DISABLED_$test" --gtest_also_run_disabled_tests
    echo $? >"$log.status"
  ) &
done
wait
for test in $failures; do
  log=$folder/$test
  status=$(cat "$log.status")
  if [ "$status" -eq 0 ] || [ "$status" -eq 124 ] || grep -q '\[  FAILED' "$log" ||
    ! grep -q '\[  PASSED  \] 1 test' "$log"; then
    failed "$test: status $status"
  fi
done
exit $bad
