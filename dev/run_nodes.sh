#!/bin/sh
# dev/run_nodes.sh [--dry-run] HOSTFILE OPTIONS: several machines over MPI. HOSTFILE has a line "NAME slots=RANKS" for each; mpirun
# reaches them by ssh without a password. OPTIONS are those of `train_gpt train`.
#
#   printf 'node1 slots=8\nnode2 slots=8\n' >hosts
#   dev/run_nodes.sh hosts --train '/shared/data/train_*.bin' --val '/shared/data/val_*.bin' --out /shared/runs/a \
#     --model gpt2 --global-batch 512 --batch-size 32 --seq-len 1024
#
# Run it in a folder that all machines have under the same name, on the first of them. NCCL_* and OMP_* are passed on.
set -eu
. "$(dirname "$0")/launch.sh"
[ "${1:-}" != --dry-run ] || { dry_run=yes; shift; }
[ $# -ge 2 ] || usage 'dev/run_nodes.sh [--dry-run] HOSTFILE OPTIONS'
hosts=$1
shift
[ -r "$hosts" ] || fail "it cannot be read, $hosts, write a line 'NAME slots=RANKS' for each machine"
wrong=$(grep -vE '^[[:space:]]*(#|$)' "$hosts" | grep -vE '^[^[:space:]=]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$' | head -n 1 || true)
[ -z "$wrong" ] || fail "this line is no 'NAME slots=RANKS', $hosts, '$wrong'"
slots=$(sed -n 's/^[^#]*slots=\([0-9]*\).*/\1/p' "$hosts")
[ -n "$slots" ] || fail "it names no machine, $hosts, write a line 'NAME slots=RANKS' for each"
ranks=$(echo "$slots" | awk '{ sum += $1 } END { print sum }')
check_program
check_command mpirun 'apt-get install openmpi-bin'

root=
[ "$(id -u)" -ne 0 ] || root=--allow-run-as-root
passed=
for name in $(env | sed -n 's/^\(PATH\|LD_LIBRARY_PATH\|NCCL_[A-Z0-9_]*\|OMP_[A-Z0-9_]*\)=.*/\1/p' | sort); do
  passed="$passed -x $name"
done
# shellcheck disable=SC2086  # lists of words
run mpirun -q $root --hostfile "$hosts" -np "$ranks" --map-by slot --bind-to none $passed --wdir "$PWD" "$program" train "$@"
