#!/bin/sh
# dev/plot_norms.sh OUT.png LOG.jsonl [kind|layer|role]: the telemetry of a run made with --norms-every, over its steps:
# norm of the weight, norm of the step, dual norm of the gradient, sharpness and alignment, each in the norm of the tensor's
# rule, and the band of the step direction's singular values.
#   kind   a curve for each kind of matrix, averaged over layers (the default)
#   layer  a curve for each layer, averaged over its matrices
#   role   a curve for each role, vectors among them
# OUT may also end in .svg. Steps where a logarithmic axis has no place for a number (a negative sharpness) are left out.
set -eu

if [ $# -lt 2 ]; then
  echo "usage: dev/plot_norms.sh OUT.png LOG.jsonl [kind|layer|role]" >&2
  exit 2
fi
out=$1 log=$2 by=${3:-kind}
case $by in
  kind | layer | role) ;;
  *) echo "dev/plot_norms.sh: error: curves are by kind, layer or role, $by, name one of them" >&2; exit 2 ;;
esac
command -v gnuplot >/dev/null 2>&1 || { echo "dev/plot_norms.sh: error: gnuplot is missing, get it with: apt-get install gnuplot-nox" >&2; exit 1; }
grep -q '"type":"norms"' "$log" || { echo "dev/plot_norms.sh: error: no telemetry in it, $log, train with --norms-every" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# One line "curve step weight step-norm dual sharpness alignment low high" for each curve and measured step. A tensor is what stands
# between two braces: "NAME":{"role":"..","norm_name":"..","weight":1.5,..}; null is not a number and is left out.
grep '"type":"norms"' "$log" | awk -v by="$by" '
  function value(text, key,    at) {
    at = index(text, "\"" key "\":")
    if (at == 0) return "null"
    text = substr(text, at + length(key) + 3)
    sub(/[,}].*/, "", text)
    return text
  }
  # The first or second number of "band":[low,high].
  function band(text, which,    ends) {
    if (!match(text, /"band":\[[^]]*\]/)) return "null"
    split(substr(text, RSTART + 8, RLENGTH - 9), ends, ",")
    return ends[which]
  }
  function curve_of(name, role,    layer) {
    if (by == "role") return role
    if (role == "vector" || role == "scalar") return ""
    layer = name
    if (by == "layer") return sub(/^h\./, "", layer) ? sprintf("layer %3d", layer) : ""
    sub(/^h\.[0-9]+\./, "", name)
    sub(/\.weight$/, "", name)
    return name
  }
  BEGIN { split("weight step gradient_dual sharpness alignment", keys, " ") }
  {
    step = value($0, "step")
    sub(/.*"tensors":\{/, "")
    parts = split($0, part, "}")
    delete sum; delete count; delete seen
    for (i = 1; i <= parts; ++i) {
      if (!match(part[i], /"[^"]+":\{/)) continue
      name = substr(part[i], RSTART + 1, RLENGTH - 4)
      role = value(part[i], "role"); gsub(/"/, "", role)
      curve = curve_of(name, role)
      if (curve == "") continue
      seen[curve] = 1
      for (k = 1; k <= 7; ++k) {
        x = k <= 5 ? value(part[i], keys[k]) : band(part[i], k - 5)
        if (x == "null") continue
        sum[curve, k] += x
        ++count[curve, k]
      }
    }
    for (curve in seen) {
      line = curve "\t" step
      for (k = 1; k <= 7; ++k) line = line "\t" (count[curve, k] ? sum[curve, k] / count[curve, k] : "?")
      print line
    }
  }' >"$work/points"
cut -f1 "$work/points" | sort -u >"$work/curves"

n=0
while IFS= read -r curve; do
  n=$((n + 1))
  awk -F'\t' -v curve="$curve" '$1 == curve' "$work/points" | cut -f2- >"$work/curve$n"
done <"$work/curves"

# plots COLUMN [COLUMN]: the curves of one panel, those that have numbers there
plots() {
  n=0
  while IFS= read -r curve; do
    n=$((n + 1)) title="title '$curve'"
    cut -f"$1" "$work/curve$n" | grep -q '[0-9]' || continue
    for column; do
      printf "'%s' using 1:%s with linespoints lw 2 pt 7 ps 0.4 lc %s %s," "$work/curve$n" "$column" "$n" "$title"
      title=notitle
    done
  done <"$work/curves" | sed 's/,$//' | grep . || echo 'NaN notitle'
}
case $out in
  *.svg) terminal="svg noenhanced size 1200,1150 font 'Helvetica,14' background rgb 'white'" ;;
  *) terminal="pngcairo noenhanced size 1200,1150 font 'Helvetica,11'" ;;
esac
gnuplot <<EOF
set terminal $terminal
set output '$out'
set datafile missing '?'
set grid
set xlabel 'step'
set key outside right top
set multiplot layout 3,2
unset key
set logscale y
set title 'norm of the weight'
plot $(plots 2)
set key outside right top
set title 'norm of the step'
plot $(plots 3)
unset key
set title 'dual norm of the gradient'
plot $(plots 4)
set title 'sharpness along the step'
plot $(plots 5)
unset logscale y
set yrange [-0.1:1.05]
set title 'alignment of the step with the gradient'
plot $(plots 6)
set yrange [0:*]
set title 'smallest and largest singular value of the step direction'
plot $(plots 7 8)
unset multiplot
EOF
