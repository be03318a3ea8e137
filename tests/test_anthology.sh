#!/bin/sh
# tests/test_anthology.sh: the scripts of `make anthology` make a page with pictures; two of the experiments, tiny (all of
# them are in `make check`). TRAIN_GPT is the program.
set -eu
command -v python3 >/dev/null 2>&1 || { echo 'python3 is not installed'; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

anthology() {
  python3 dev/anthology/anthology.py --quick --only figure1,descent --corpus none --program "$TRAIN_GPT" --out "$work" \
    --results "$work/page"
}
anthology >"$work/first"
for file in README.md figure1.png sharpness.png descent.json; do
  [ -s "$work/page/$file" ] || { cat "$work/first"; echo "no $file"; exit 1; }
done
! grep -q 'Left out' "$work/page/README.md" || { cat "$work/page/README.md"; exit 1; }
# What was trained is not trained again.
anthology >"$work/second"
! grep -q 'to make' "$work/second" || { cat "$work/second"; exit 1; }
