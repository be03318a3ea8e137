#!/bin/sh
# dev/muon_vs_adamw.sh [OUT]: the default recipe against AdamW at several step sizes, on the data and model of `make run`
# (run that first: its own log is the default recipe's). Everything but the optimizer is the same; 6 minutes on 2 cores.
# OUT/curves.png shows all of them.
set -eu
out=${1:-out/muon-vs-adamw}

adamw() {
  lr=$1
  decayed=adam:lr=$lr,beta1=0.9,beta2=0.95,wd=0.1
  ./train_gpt train --config dev/kjv.conf --train 'out/data/train_*.bin' --val 'out/data/val_*.bin' \
    --out "$out/adamw-lr-$lr" --checkpoint-every 0 --resume --recipe adamw --hidden "$decayed" --embedding "$decayed" \
    --position "$decayed" --vector "adam:lr=$lr,beta1=0.9,beta2=0.95"
}
mkdir -p "$out/muon"
cp out/log.jsonl "$out/muon/"
for lr in 0.003 0.006 0.01; do adamw "$lr"; done
dev/plot.sh "$out/curves.png" "$out"/*/log.jsonl
