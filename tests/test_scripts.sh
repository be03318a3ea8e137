#!/bin/sh
# tests/test_scripts.sh: the scripts that start ranks print the command that they run, and say in one line what is wrong with
# what they were given. mpirun and srun are stand-ins that print their arguments.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin"
for name in mpirun srun; do
  printf '#!/bin/sh\nfor word; do printf "<%%s>" "$word"; done\necho\n' >"$work/bin/$name"
done
# A program that says who it is, and fails when it is asked to.
cat >"$work/bin/program" <<'END'
#!/bin/sh
echo "${RANK:-} of ${WORLD_SIZE:-}, ${LOCAL_RANK:-} here, ${MASTER_ADDR:-}:${MASTER_PORT:-}: $*"
case "$*" in *--fail*) exit $((${RANK:-0} == 1 ? 3 : 0)) ;; esac
END
chmod +x "$work"/bin/*
export PATH="$work/bin:$PATH" TRAIN_GPT="$work/bin/program"
unset NODES NODE MASTER_ADDR MASTER_PORT LD_LIBRARY_PATH START 2>/dev/null || true

failed=0
# expect WHAT FOUND EXPECTED
expect() {
  [ "$2" = "$3" ] || { printf '%s:\n  %s\ninstead of\n  %s\n' "$1" "$2" "$3"; failed=1; }
}
# refused PART COMMAND...: status 2 and one line with PART
refused() {
  part=$1 status=0
  shift
  "$@" >"$work/out" 2>"$work/err" || status=$?
  if [ "$status" -ne 2 ] || [ "$(wc -l <"$work/err")" -ne 1 ] || ! grep -q -e "$part" "$work/err"; then
    echo "$*: status $status, expected 2 and '$part'"
    cat "$work/err"
    failed=1
  fi
}
root=
[ "$(id -u)" -ne 0 ] || root='--allow-run-as-root '

# One node.
expect 'one node' "$(dev/run_node.sh --dry-run 4 --train 'data/*.bin' --out "it's")" \
  "mpirun -q ${root}--oversubscribe --bind-to none -np 4 $TRAIN_GPT train --train 'data/*.bin' --out 'it'\''s'"
dev/run_node.sh 2 --train 'data/*.bin' --seed 1 >"$work/out"
expect 'one node, what mpirun gets' "$(tail -n 1 "$work/out" | sed 's/<--allow-run-as-root>//')" \
  "<-q><--oversubscribe><--bind-to><none><-np><2><$TRAIN_GPT><train><--train><data/*.bin><--seed><1>"
refused usage dev/run_node.sh
refused 'number of ranks' dev/run_node.sh two --train x
refused 'number of ranks' dev/run_node.sh 0 --train x
refused 'no program to start' env TRAIN_GPT="$work/none" dev/run_node.sh 2 --train x

# Several nodes.
printf '# two machines\nnode1 slots=8\nnode2 slots=4\n\n' >"$work/hosts"
expect 'several nodes' "$(NCCL_ALGO=Ring dev/run_nodes.sh --dry-run "$work/hosts" --train x | sed "s| -x OMP_[A-Z_]*||g")" \
  "mpirun -q ${root}--hostfile $work/hosts -np 12 --map-by slot --bind-to none -x NCCL_ALGO -x PATH --wdir $PWD $TRAIN_GPT train --train x"
printf 'node1 slots=8\nnode2\n' >"$work/wrong"
refused "'node2'" dev/run_nodes.sh "$work/wrong" --train x
refused 'names no machine' dev/run_nodes.sh /dev/null --train x
refused 'cannot be read' dev/run_nodes.sh "$work/none" --train x

# Slurm.
refused 'no Slurm job' env -u SLURM_JOB_ID dev/run_slurm.sbatch --train x
export SLURM_JOB_ID=7 SLURM_SUBMIT_DIR="$PWD"
cp dev/run_slurm.sbatch "$work/copy"  # as Slurm does
expect 'Slurm, MPI' "$("$work/copy" --dry-run --train x)" \
  "srun --kill-on-bad-exit=1 --mpi=pmix $TRAIN_GPT train --train x --resume"
START=env MASTER_ADDR=node1 "$work/copy" --train x --resume >"$work/out"
expect 'Slurm, no MPI' "$(cat "$work/out")" "MASTER_ADDR=node1 MASTER_PORT=20007
srun --kill-on-bad-exit=1 --mpi=none $TRAIN_GPT train --train x --resume
<--kill-on-bad-exit=1><--mpi=none><$TRAIN_GPT><train><--train><x><--resume>"
refused 'mpi or env' env START=torch "$work/copy" --train x
unset SLURM_JOB_ID SLURM_SUBMIT_DIR

# Without MPI: every rank of this machine is started and waited for.
NODES=2 NODE=1 MASTER_ADDR=node1 dev/run_env.sh 2 --seed 5 | grep ' of ' | sort >"$work/out"
expect 'without MPI' "$(cat "$work/out")" "2 of 4, 0 here, node1:29500: train --seed 5
3 of 4, 1 here, node1:29500: train --seed 5"
expect 'without MPI, dry' "$(dev/run_env.sh --dry-run 1 --seed 5)" \
  "env RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 $TRAIN_GPT train --seed 5"
status=0
dev/run_env.sh 3 --fail >/dev/null || status=$?
expect 'the status of a rank that failed' "$status" 3
refused 'name of machine 0' env NODES=2 dev/run_env.sh 2 --train x
refused 'machines are 0 to 1' env NODES=2 NODE=2 MASTER_ADDR=a dev/run_env.sh 2 --train x
exit "$failed"
