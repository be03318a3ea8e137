#!/bin/sh
# dev/run_env.sh [--dry-run] RANKS OPTIONS: RANKS ranks on this machine without MPI: they find each other by RANK, WORLD_SIZE,
# MASTER_ADDR and MASTER_PORT, as under torchrun. For GPUs, over NCCL; processes on CPUs need MPI. OPTIONS are those of
# `train_gpt train`.
#
#   dev/run_env.sh 8 --train 'data/train_*.bin' --val 'data/val_*.bin' --out runs/a --model gpt2 --global-batch 512
#
# Several machines: the same command on each, with the same RANKS, after
#   export NODES=2 NODE=0 MASTER_ADDR=node1       NODE=1 on the second; MASTER_ADDR is the machine of NODE=0
set -eu
. "$(dirname "$0")/launch.sh"
[ "${1:-}" != --dry-run ] || { dry_run=yes; shift; }
[ $# -ge 2 ] || usage 'dev/run_env.sh [--dry-run] RANKS OPTIONS'
ranks=$1 nodes=${NODES:-1} node=${NODE:-0}
shift
is_count "$ranks" || fail "a number of ranks above 0 is needed, $ranks, write dev/run_env.sh 8 --train ..."
is_count "$nodes" || fail "a number of machines above 0 is needed, NODES=$nodes, export NODES=2"
case $node in '' | *[!0-9]*) node=$nodes ;; esac
[ "$node" -lt "$nodes" ] || fail "machines are 0 to $((nodes - 1)), NODE=${NODE:-}, export NODE"
[ "$nodes" -eq 1 ] || [ -n "${MASTER_ADDR:-}" ] || fail "the name of machine 0 is needed, MASTER_ADDR, export it on all machines"
check_program

started='' status=0 local=0
trap 'kill $started 2>/dev/null || true' INT TERM
while [ "$local" -lt "$ranks" ]; do
  (run env RANK=$((node * ranks + local)) LOCAL_RANK="$local" WORLD_SIZE=$((nodes * ranks)) \
    MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" MASTER_PORT="${MASTER_PORT:-29500}" "$program" train "$@") &
  started="$started $!"
  [ "$dry_run" = no ] || wait $!  # one line after the other
  local=$((local + 1))
done
# A rank that fails ends the others by itself; the status is the first that is not 0.
for process in $started; do
  code=0
  wait "$process" || code=$?
  while kill -0 "$process" 2>/dev/null; do wait "$process" || code=$?; done  # a signal ended the wait, not the rank
  [ "$status" -ne 0 ] || status=$code
done
exit "$status"
