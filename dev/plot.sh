#!/bin/sh
# dev/plot.sh OUT.png LOG.jsonl [LOG.jsonl ...]: training and validation loss of one or more runs, against tokens.
# The legend names the folder that each log lies in. OUT may also end in .svg.
set -eu

if [ $# -lt 2 ]; then
  echo "usage: dev/plot.sh OUT.png LOG.jsonl [LOG.jsonl ...]" >&2
  exit 2
fi
out=$1
shift
command -v gnuplot >/dev/null 2>&1 || { echo "dev/plot.sh: error: gnuplot is missing, get it with: apt-get install gnuplot-nox" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# tokens and loss of the lines of one type; the log is one flat JSON object per line
points() {
  grep "\"type\":\"$1\"" "$2" | sed -n 's/.*"tokens":\([0-9]*\).*"loss":\([-0-9.e+]*\).*/\1 \2/p'
}
curves=
n=0
for log in "$@"; do
  n=$((n + 1))
  name=$(basename "$(dirname "$log")")
  points train "$log" >"$work/train$n"
  points val "$log" >"$work/val$n"
  [ -s "$work/val$n" ] || { echo "dev/plot.sh: error: no validation lines in it, $log, give the log.jsonl of a run" >&2; exit 1; }
  [ -s "$work/train$n" ] && [ $# -eq 1 ] &&
    curves="$curves '$work/train$n' using (\$1/1e6):2 with lines lc rgb '#b0c4de' title 'training',"
  curves="$curves '$work/val$n' using (\$1/1e6):2 with linespoints lw 2 pt 7 ps 0.6 lc $n title 'validation, $name',"
done
# The first losses are far above the rest: cut them, or the curves would all be flat.
top=$(cat "$work"/val* | awk 'NR == 1 { first = $2 } { last = $2 } END { print (first < 2.5 * last) ? first : 2.5 * last }')
case $out in
  *.svg) terminal="svg noenhanced size 900,540 font 'Helvetica,14' background rgb 'white'" ;;
  *) terminal="pngcairo noenhanced size 900,540 font 'Helvetica,12'" ;;
esac
gnuplot <<EOF
set terminal $terminal
set output '$out'
set xlabel 'tokens (millions)'
set ylabel 'loss (nats per token)'
set grid
set key top right
set yrange [*:$top]
plot ${curves%,}
EOF
