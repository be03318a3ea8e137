#!/bin/sh
# dev/run_node.sh [--dry-run] RANKS OPTIONS: one machine, RANKS ranks over MPI. OPTIONS are those of `train_gpt train`.
#
#   dev/run_node.sh 8 --train 'data/train_*.bin' --val 'data/val_*.bin' --out runs/a --model gpt2 --global-batch 512 \
#     --batch-size 64 --seq-len 1024
#
# On GPUs a rank takes the GPU of its number on this machine; on the CPU it takes its part of the cores.
set -eu
. "$(dirname "$0")/launch.sh"
[ "${1:-}" != --dry-run ] || { dry_run=yes; shift; }
[ $# -ge 2 ] || usage 'dev/run_node.sh [--dry-run] RANKS OPTIONS'
ranks=$1
shift
is_count "$ranks" || fail "a number of ranks above 0 is needed, $ranks, write dev/run_node.sh 8 --train ..."
check_program
check_command mpirun 'apt-get install openmpi-bin'

root=
[ "$(id -u)" -ne 0 ] || root=--allow-run-as-root
# No binding: a rank has several threads, and finds its part of the cores by itself. Oversubscribing: OpenMPI counts cores, and
# GPUs are what counts.
run mpirun -q $root --oversubscribe --bind-to none -np "$ranks" "$program" train "$@"
