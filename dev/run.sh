#!/bin/sh
# dev/run.sh: the main job after installing and building (see `make run`): the King James Bible becomes tokens, a small
# GPT-2 learns it with the modular-norm recipe, and out/ receives the log, a checkpoint, a loss plot and a sample.
# Every step reuses what is done; an interrupted training continues.
set -eu
out=${OUT:-out}

mkdir -p "$out"
[ -s "$out/kjv.txt" ] || data/kjv.sh "$out/kjv.txt"
./train_gpt prepare --text "$out/kjv.txt" --out "$out/data"
./train_gpt train --config dev/kjv.conf --train "$out/data/train_*.bin" --val "$out/data/val_*.bin" --out "$out" --resume
dev/plot.sh "$out/loss.png" "$out/log.jsonl"
echo "loss curve: $out/loss.png   log: $out/log.jsonl   checkpoint: $out/checkpoints/"
echo "--- a sample: ./train_gpt generate --model $out --prompt 'And it came to pass' ---"
./train_gpt generate --model "$out" --prompt 'And it came to pass' --tokens 400 --temperature 0.7
