#!/bin/sh
# tests/gtest.sh PROGRAM [ARGUMENTS]: runs a GoogleTest program as one process per core, each with its share of the tests, and
# prints what they print, one after the other. Exit status 1 when one failed.
set -u
shards=$(nproc)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_WAIT_POLICY=passive # threads that spin while they wait would take the other process's core
export CUDA_ON_CPU_THREADS="${CUDA_ON_CPU_THREADS:-1}" # of the executor: a fifth faster than sharing the cores
export CUDA_ON_CPU_STREAMS="${CUDA_ON_CPU_STREAMS:-late}" # work as late as a GPU may do it: missing waits show
export GTEST_TOTAL_SHARDS="$shards"
shard=0 processes=
while [ "$shard" -lt "$shards" ]; do
  GTEST_SHARD_INDEX=$shard "$@" >"$folder/$shard" 2>&1 &
  processes="$processes $!"
  shard=$((shard + 1))
done
status=0
for process in $processes; do wait "$process" || status=1; done
cat "$folder"/*
exit $status
