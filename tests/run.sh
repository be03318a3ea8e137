#!/bin/sh
# tests/run.sh PROGRAM BUILD: runs every test of `make test`, those of BUILD with its own CUDA path and those of the program
# from the outside with PROGRAM, and closes with "N passed, N failed[, N skipped]". Exit status 1 when something failed.
set -u
program=$PWD/$1 build=$2
passed=0 failed=0 skipped=0

# count FILE WORD: the sum over the processes' summaries, "[  WORD  ] N tests"
count() { sed -n "s/^\[  $2 *\] \([0-9]*\) test.*/\1/p" "$1" | awk '{ sum += $1 } END { print sum + 0 }'; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
log=$folder/all

# script FILE: a program with a status of its own: 0 passed, 77 skipped, else failed.
script() {
  name=$(basename "$1")
  TRAIN_GPT=$program BUILD=$build "$1" >"$folder/$name" 2>&1
  echo $? >"$folder/$name.status"
}
# These use one core and depend on no time, or on much of it: beside the rest. The others have the machine to themselves.
calm='tests/test_anthology.sh tests/test_gpu_check.sh tests/test_plan.sh tests/test_readme.sh tests/test_transformers.sh'
(for file in $calm; do script "$file"; done) &

TRAIN_GPT=$program TRAIN_GPT_GPU=$PWD/$build/train_gpt tests/gtest.sh "$build/tests/all" >"$log" 2>&1
status=$?
grep -E '^\[  FAILED  \]|: Failure$|^\[  SKIPPED \]' "$log"
if [ "$status" -ne 0 ]; then grep -v '^\[ RUN\|^\[       OK\|^\[---' "$log" | head -n 200; fi
n=$(count "$log" PASSED); passed=$((passed + ${n:-0}))
n=$(count "$log" 'FAILED ' ); failed=$((failed + ${n:-0}))
n=$(count "$log" 'SKIPPED'); skipped=$((skipped + ${n:-0}))
# A crash leaves no summary: that is a failure too.
if [ "$status" -ne 0 ] && [ "$failed" -eq 0 ]; then failed=1; fi

wait
for file in tests/test_*.sh; do
  name=$(basename "$file")
  [ -e "$folder/$name.status" ] || script "$file"
  case $(cat "$folder/$name.status") in
    0) passed=$((passed + 1)) ;;
    77) skipped=$((skipped + 1)); echo "$file: $(tail -n 1 "$folder/$name")" ;;
    *) failed=$((failed + 1)); echo "$file failed:"; tail -n 50 "$folder/$name" ;;
  esac
done

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
