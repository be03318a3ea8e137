#!/bin/sh
# tests/check_without_mpi.sh: the CPU program built with MPI=0 trains alone, and says that it cannot be one of several
# processes, whoever starts them, instead of training the same run in each. Takes the objects of build/cpu but the one that
# knows of MPI.
set -eu
cd "$(dirname "$0")/.."
build=build/no-mpi
${MAKE:-make} -j"$(nproc)" CUDA=0 build/cpu/train_gpt
rm -rf "$build"
mkdir -p "$build"
for part in build/cpu/*.o build/cpu/*.gch build/cpu/revision build/cpu/data build/cpu/model build/cpu/optim build/cpu/world; do
  cp -a "$part" "$build/"
done
${MAKE:-make} -j"$(nproc)" CUDA=0 MPI=0 BUILD="$build" "$build/train_gpt"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() {
  echo "tests/check_without_mpi.sh: error: $1: $(cat "$work/words")" >&2
  exit 1
}
ldd "$build/train_gpt" >"$work/words"
! grep 'libmpi' "$work/words" || fail 'linked with MPI'

"$build/train_gpt" prepare --text README.md CONTRIBUTING.md --out "$work/data"
# train OUT [LAUNCHER]: two steps
train() {
  out=$work/$1
  shift
  timeout 60 "$@" "$build/train_gpt" train --train "$work/data/train_*.bin" --val "$work/data/val_*.bin" --out "$out" \
    --model gpt2-nano --batch-size 2 --seq-len 32 --steps 2 >"$work/words" 2>&1
}
train alone || fail 'it does not train alone'
[ "$(grep -c '"loss"' "$work/alone/log.jsonl")" -ge 2 ] || fail 'two steps are not in the log'

# refused WORDS LAUNCHER...: status 2, these words, and no run
refused() {
  words=$1 status=0
  shift
  train refused "$@" || status=$?
  [ "$status" -eq 2 ] || fail "status $status after $*"
  grep -q "built $words.*, install .* and build again, or start one process" "$work/words" || fail "not said after $*: built $words"
  [ ! -e "$work/refused" ] || fail "a run after $*"
}
without='without MPI and several processes'
refused "$without" env OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2
refused "$without" env PMI_RANK=0 PMI_SIZE=2
refused "$without" env SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=2
refused 'with neither MPI nor NCCL' env RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1
refused 'with neither MPI nor NCCL' env OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1
if command -v mpirun >/dev/null; then refused "$without" mpirun -q --allow-run-as-root --oversubscribe -np 2; fi
