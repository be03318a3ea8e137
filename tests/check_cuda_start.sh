#!/bin/sh
# tests/check_cuda_start.sh [BUILD]: the program for GPUs, as tests/check_ptxas.sh built it, begins and trains on the CPU where
# nothing of CUDA is: the loader asks for none of its libraries. Those that it opens on a GPU have every function that it
# calls, and one that is missing, broken or too old is named. Needs no GPU. Exit status 77 without nvcc.
set -eu
build=${1:-build/cuda}
cd "$(dirname "$0")/.."
command -v "${NVCC:-nvcc}" >/dev/null 2>&1 || { echo 'nvcc is not installed: no program for GPUs'; exit 77; }
${MAKE:-make} -j"$(nproc)" DEVICE=cuda BUILD="$build" "$build/train_gpt" "$build/tests/cuda_libraries"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() {
  echo "tests/check_cuda_start.sh: error: $1" >&2
  exit 1
}

# What the loader wants before main(): the driver's library is not among it either.
ldd "$build/train_gpt" >"$work/ldd"
! grep -E 'lib(cuda|cudart|cublas|cublasLt|nccl)\.|not found' "$work/ldd" || fail 'the loader needs CUDA'

# No GPU: the default is the CPU, and who asks for one is told.
export CUDA_VISIBLE_DEVICES=
"$build/train_gpt" prepare --text README.md CONTRIBUTING.md --out "$work/data"
train() {
  "$build/train_gpt" train --train "$work/data/train_*.bin" --val "$work/data/val_*.bin" --out "$work/run" --model gpt2-nano \
    --batch-size 2 --seq-len 32 --steps 2 "$@"
}
train
grep -c '"loss"' "$work/run/log.jsonl" | grep -q '^[2-9]' || fail 'two steps on the CPU are not in the log'
! train --device cuda 2>"$work/words" || fail '--device cuda without a GPU went well'
grep 'use --device cpu' "$work/words" || fail "not said that there is no GPU: $(cat "$work/words")"

# The libraries as they are installed, found where the Makefile says.
env -u LD_LIBRARY_PATH "$build/tests/cuda_libraries" || fail 'the libraries of CUDA lack something'
# says WORDS: what the program says about cuBLASLt in $work ends it, and has these words.
says() {
  ! LD_LIBRARY_PATH=$work "$build/tests/cuda_libraries" >"$work/words" || fail "went well in spite of: $1"
  grep "^products on a GPU need cuBLASLt, $work/$library: $1.*LD_LIBRARY_PATH" "$work/words" || fail "not said: $1: $(cat "$work/words")"
}
library=libcublasLt.so.$(sed -n 's/^#define CUBLAS_VER_MAJOR //p' "$(dirname "$(command -v "${NVCC:-nvcc}")")/../include/cublas_api.h")
: >"$work/$library"
says 'file too short'
echo 'void cublasLtDestroy(void) {}' | "${CC:-gcc}" -shared -fPIC -x c - -o "$work/$library"
says 'undefined symbol: cublasLt'
