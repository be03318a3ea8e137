#!/bin/sh
# tests/check.sh: the slow checks of `make check`. Each is one line of the summary; closes with "N passed, N failed".
set -u
passed=0 failed=0
jobs=$(nproc)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

check() {
  name=$1
  shift
  start=$(date +%s)
  if "$@" >"$log" 2>&1; then
    passed=$((passed + 1))
    echo "ok      $name ($(($(date +%s) - start)) s)"
  else
    failed=$((failed + 1))
    echo "FAILED  $name: $*"
    tail -n 60 "$log"
  fi
}

# Address and undefined-behaviour sanitizers over all tests but those of the program, and over the fuzzer. The BLAS of
# LAPACK is not ours; leaks are checked.
sanitize='-fsanitize=address,undefined -fno-sanitize-recover=all'
sanitized() {
  make -j"$jobs" BUILD=build/asan OPT='-O1 -march=native' EXTRA="$sanitize" build/asan/train_gpt build/asan/tests/all \
    build/asan/tests/fuzz_files
}
check 'build with sanitizers' sanitized
check 'tests under address and undefined-behaviour sanitizers' build/asan/tests/all --gtest_filter='-Program.*'
check 'the program under sanitizers' env TRAIN_GPT="$PWD/build/asan/train_gpt" \
  build/asan/tests/all --gtest_filter='Program.*-*Kill*'
check 'fuzzing shards, safetensors, JSON and options' build/asan/tests/fuzz_files 60 1
check 'kill -9 at 60 random moments' env KILLS=60 TRAIN_GPT="$PWD/build/cpu/train_gpt" \
  build/cpu/tests/all --gtest_filter='Program.KillAtRandomMoments*'
check 'format and lint' make lint

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
