#!/bin/sh
# tests/gtest.sh PROGRAM [ARGUMENTS]: runs a GoogleTest program on all cores and prints what it prints, part by part. The tests
# are dealt out to more parts than there are cores, and a core that is done takes the next one: tests that run a whole program
# last a thousand times as long as others. Exit status 1 when one failed.
set -u
cores=$(nproc)
parts=$((cores * 8))
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_WAIT_POLICY=passive # threads that spin while they wait would take the other process's core
export CUDA_ON_CPU_THREADS="${CUDA_ON_CPU_THREADS:-1}" # of the executor: a fifth faster than sharing the cores
export CUDA_ON_CPU_STREAMS="${CUDA_ON_CPU_STREAMS:-late}" # work as late as a GPU may do it: missing waits show
export CUDA_ON_CPU_ROUNDING="${CUDA_ON_CPU_ROUNDING:-gpu:0}" # and rounded otherwise than the CPU, as a GPU does
export GTEST_TOTAL_SHARDS="$parts" FOLDER="$folder"
seq 0 $((parts - 1)) | xargs -P "$cores" -I {} sh -c 'GTEST_SHARD_INDEX={} "$@" >"$FOLDER/$(printf %04d {})" 2>&1' sh "$@"
status=$?
cat "$folder"/*
[ "$status" -eq 0 ]
