#!/bin/sh
# dev/muon_vs_adamw.sh [OUT]: the default recipe against AdamW at several step sizes, on the data and model of `make run`
# (run that first). Everything but the optimizer is the same; 8 minutes on 2 cores. OUT/curves.png shows all of them.
set -eu
out=${1:-out/muon-vs-adamw}

run() {
  name=$1
  shift
  ./train_gpt train --config dev/kjv.conf --train 'out/data/train_*.bin' --val 'out/data/val_*.bin' --out "$out/$name" \
    --checkpoint-every 0 --resume "$@"
}
adamw() {
  name=$1 lr=$2
  decayed=adam:lr=$lr,beta1=0.9,beta2=0.95,wd=0.1
  run "$name" --recipe adamw --hidden "$decayed" --embedding "$decayed" --position "$decayed" \
    --vector "adam:lr=$lr,beta1=0.9,beta2=0.95"
}
mkdir -p "$out"
run muon
adamw adamw-lr-0.003 0.003
adamw adamw-lr-0.01 0.01
adamw adamw-lr-0.02 0.02
dev/plot.sh "$out/curves.png" "$out"/*/log.jsonl
