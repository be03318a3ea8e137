#!/bin/sh
# tests/test_plan.sh: the cost model says what is published, what train_gpt itself says, and what cannot be otherwise.
# TRAIN_GPT is the program.
set -eu
command -v python3 >/dev/null 2>&1 || { echo 'python3 is not installed'; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
plan() { python3 -B dev/plan/plan.py "$@"; }

plan --formulas --model 124M,355M,774M,1558M --gpus 1,8 >"$work/formulas"
plan --json --machine dev/plan/machines/h200.json --model 124M,355M,774M,1558M --rows-per-gpu 16 --batch-size 16 \
  --gpus 1,2,3,4,5,7,8,9,12,24,25,31,64,72,100,288,1024 >"$work/weak"
plan --json --machine dev/plan/machines/h200.json --model 124M --gpus 1,2,8,64,512 >"$work/strong"
for pair in 124M:64 355M:32 774M:32 1558M:16; do
  plan --json --machine dev/plan/machines/h200.json --model "${pair%:*}" --gpus 1 --global-batch "${pair#*:}" >"$work/one-${pair%:*}"
done
# The memory plan, and the FLOPs that the mfu of a step counts.
"$TRAIN_GPT" info --device cpu --dtype fp32 --model gpt2 --batch-size 4 --seq-len 256 >"$work/info"
python3 -c 'import array, sys
ids = array.array("i", [20240520, 1, 4096] + [0] * 253).tobytes() + array.array("H", [i * 7 % 50000 for i in range(4096)]).tobytes()
open(sys.argv[1], "wb").write(ids)' "$work/tokens.bin"
"$TRAIN_GPT" train --device cpu --threads 1 --train "$work/tokens.bin" --val "$work/tokens.bin" --out "$work/run" --model gpt2-nano \
  --seq-len 128 --batch-size 2 --steps 2 --val-tokens 128 >/dev/null

python3 -B - "$work" <<'PYTHON'
import dataclasses, json, re, sys
sys.path.insert(0, "dev/plan")
import formulas as f, owners, timeline
from machine import Machine

work = sys.argv[1]
read = lambda name: json.load(open(f"{work}/{name}"))
failed = []


def check(what, found, expected, tolerance=0.0):
    if not abs(found - expected) <= tolerance:
        failed.append(f"{what}: {found}, expected {expected}")


# The table of volumes and the work of optimizers.md section 4, to the printed digit; it adds up rounded parts.
m, N = f.MODELS["gpt2"], 8
P, hidden = f.size_of(m), f.size_of(m, "hidden")
for what, volume, printed in (("all-reduce bf16", f.all_reduce_bytes(2 * P, N), 435.5), ("fp32", f.all_reduce_bytes(4 * P, N), 871.1),
                              ("reduce-scatter bf16", f.reduce_scatter_bytes(2 * P, N), 217.8),
                              ("reduce-scatter fp32", f.reduce_scatter_bytes(4 * P, N), 435.5),
                              ("all-gather bf16", f.all_gather_bytes(2 * P, N), 217.8),
                              ("all-gather hidden", f.all_gather_bytes(2 * hidden, N), 148.6)):
    check(what, round(volume / 1e6, 1), printed)
formulas = {(line["model"], line["gpus"]): line for line in read("formulas")}
at8, at1 = formulas["gpt2", 8], formulas["gpt2", 1]
printed = {"all-reduce, optimizer on every rank": (435.5, 871.1), "all-reduce, then gather hidden updates": (584.1, 871.1 + 148.6),
           "reduce-scatter to owners, all-gather (ours)": (435.5, 653.3),
           "element shards, gather hidden directions": (584.1, 801.9), "FSDP, all-to-all to whole matrices: extra": (37.2, 37.2)}
for scheme, (bf16, fp32) in printed.items():
    check(scheme, at8["mb_per_rank"]["bf16"][scheme], bf16, 0.1)
    check(scheme + ", fp32 gradients", at8["mb_per_rank"]["fp32 gradients"][scheme], fp32, 0.1)
check("parameters", at8["parameters"], 124439808)
for key in ("most", "least"):
    check("GFLOP of a rank at N = 8", round(at8["newton_schulz_gflop"][key], 1), 203.8)
check("TFLOP at N = 1", round(at1["newton_schulz_gflop"]["most"] / 1e3, 3), 1.631)
for key, megabytes in {"momentum": 42.5, "masters": 62.2, "adam": 39.5}.items():
    check(f"{key} of a rank at N = 8", round(at8["state_mb_mean"][key], 1), megabytes)

# The reachable times of gpu_kernels.md section 1.3, from the same rates; they leave the update out.
for size, ms in {"124M": 89.7, "355M": 123.0, "774M": 256.5, "1558M": 246.6}.items():
    line = read(f"one-{size}")["lines"][0]
    check(f"a micro-batch of {size}", line["step_ms"] - line["update_ms"], ms, 0.1)

# What train_gpt says of itself.
info = open(f"{work}/info").read()
job = timeline.Job(f.MODELS["gpt2"], Machine.read("dev/plan/machines/h200.json"), 1, 4, 256, 4, "fp32")
job.machine.device = "cpu"
memory = timeline.memory(job)
memory["parameters"] = memory.pop("weights")
for name in ("parameters", "gradients", "activations", "activation gradients", "optimizer state"):
    said = float(re.search(rf"[:,] {name} ([\d.]+)", info).group(1))
    check(f"MiB of {name}", memory[name] / 2**20, said, 0.2)
run, *steps = [json.loads(line) for line in open(f"{work}/run/log.jsonl")]
step = next(line for line in steps if line["type"] == "train")
said = step["mfu"] * run["peak_flops"] / step["tokens_per_second"]
flops = f.train_flops_per_token(f.MODELS["gpt2-nano"], 128)
check("FLOPs per token over train_gpt's", flops / said, 1, 1e-5)

# What cannot be otherwise.
for name in ("weak", "strong"):
    lines = read(name)["lines"]
    for before, line in zip(lines, lines[1:]):
        if line["model"] == before["model"] and line["memory_gb"] > before["memory_gb"]:
            failed.append(f"{line['model']}: {line['gpus']} GPUs take more memory each than {before['gpus']}")
    for line in lines:
        if line["gpus"] == 1 and (line["exposed_ms"], line["busy_ms"], line["sent_mb"]) != (0, 0, 0):
            failed.append(f"{line['model']}: one GPU talks to itself")
        if not 0 <= line["exposed_ms"] <= line["busy_ms"] + 1e-9:
            failed.append(f"{line['model']} on {line['gpus']}: {line['exposed_ms']} ms exposed of {line['busy_ms']}")
for name in ("gpt2-nano", "gpt2", "gpt2-xl"):
    model = f.MODELS[name]
    for N in (1, 2, 3, 7, 8, 24, 100, 1000):
        pieces = owners.split(model, N)
        check(f"parameters of {name} that somebody of {N} owns", sum(p.size for p in pieces), model.parameters)
        owned = owners.by_owner(pieces, N)
        loads = [sum(p.work for p in rank) for rank in owned]
        largest = max(p.work for p in pieces)
        if max(loads) > max(4 / 3 * sum(loads) / N, sum(loads) / N + largest):
            failed.append(f"{name} on {N} ranks: the most loaded has {max(loads) * N / sum(loads)} of the mean")
        # Each rank sends all parts but its own, once; both ways of exchange.
        for layer, parts in owners.exchanges(pieces).items():
            S = sum(parts.values())
            sent = sum(f.sent_by(parts, rank, S) for rank in range(N))
            check(f"volume of layer {layer}", sent, (N - 1) * S)
            ring, direct = (f.largest_load(parts, N, S, way) for way in ("ring", "direct"))
            if not ring <= S or not direct >= ring or N > 1 and not N * ring >= (N - 1) * S:
                failed.append(f"{name} layer {layer} on {N}: loads {ring} and {direct} of {S}")
# Matrices of 124M cost 1 (48 of them) or 3 (24): largest first reaches the best there is.
for N in (7, 9, 11):
    loads = [sum(p.work for p in rank if p.kind == "hidden") for rank in owners.by_owner(owners.split(m, N), N)]
    check(f"units of the most loaded of {N} ranks", max(loads) / f.newton_schulz_flops(768, 768), -(-120 // N), 1e-9)
# The two orders of gathers carry the same bytes in another number of exchanges.
machine = Machine.read("dev/plan/machines/h200.json")
by_shape, by_layer = (timeline.simulate(timeline.Job(m, machine, 8, 512, gathers=way)) for way in ("shape", "layer"))
check("bytes sent", by_shape.sent, by_layer.sent, 1)
check("bytes sent against the formula, vectors in fp32 too", by_layer.sent,
      f.reduce_scatter_bytes(4 * P, 8) + f.all_gather_bytes(2 * P + 4 * f.size_of(m, "vector"), 8), 1)
check("messages by layer", by_layer.messages, 7 * (12 + 2 + 12 + 2 + 2))
check("messages by shape", by_shape.messages, 7 * (12 + 2 + 36 + 2 + 2))
check("seconds of hops within a node", machine.hops(8), 7 * 3.4e-6, 1e-12)
check("seconds of hops over two nodes", machine.hops(16), 14 * 3.4e-6 + 9.6e-6, 1e-12)
check("seconds of a small reduction", machine.scalar_seconds(2), 2 * 0.47e-6 + 8.4e-6, 1e-12)

# A link that takes no time hides everything; a slow one costs what does not fit beside the arithmetic, and no more.
data = read("weak")["machine"]
def timed(bandwidth, latency):
    machine = Machine(json.loads(json.dumps(data)))
    for key, entry in machine.data["numbers"].items():
        entry[0] = bandwidth if key.endswith("bandwidth") else latency if "latency" in key or key == "exchange_start" else entry[0]
    return timeline.simulate(timeline.Job(f.MODELS["gpt2"], machine, 8, 512))
fast, slow = timed(1e18, 1e-15), timed(1e9, 1e-6)
check("exposed by a perfect link", fast.exposed, 0, 1e-6)
check("a step is arithmetic and what it waited for", slow.total, fast.total + slow.exposed, 1e-6)
if not slow.total >= slow.busy or not slow.exposed < slow.busy:
    failed.append(f"a slow link: step {slow.total}, {slow.busy} busy, {slow.exposed} exposed")

# On paper: the speedrun's 25 ms lie above what products alone explain, and near what two other runs do.
import speedrun
estimates = speedrun.estimates(Machine.read("dev/plan/machines/h100.json"))
if not estimates["saved, by products alone"] < speedrun.MEASURED:
    failed.append(f"products alone explain {estimates['saved, by products alone']} s of {speedrun.MEASURED}")
check("saved, by Muon less Adam, of what was measured", estimates["saved, by Muon less Adam"] / speedrun.MEASURED, 1, 0.25)

# Forward and backward of one process, as measured on an idle CPU; the floor of a row says the rate of products in that run.
peers = open("dev/results/cpu_peers.md").read().partition("## Our share of the floor")[2]
cases = re.findall(r"^\| (124M|6 layers, V(\d+)), 4x(\d+) \| (\d+)(?: ms)? \| (\d+)(?: ms)? \|", peers, re.M)
ratios = []
for name, V, T, ms, floor in cases:
    model, T = dataclasses.replace(f.MODELS["gpt2" if name == "124M" else "gpt2-small"], V=int(V or 50257)), int(T)
    rate = f.train_flops_per_token(model, T) * 4 * T / (float(floor) * 1e-3)
    numbers = {"products_fp32": [rate, "FLOP/s", "that table"], "memory": [5.7e10, "bytes/s", "log.jsonl of that computer"],
               "memory_size": [1e10, "bytes", "not used here"], "inside_bandwidth": [1e9, "bytes/s", "not used here"],
               "inside_latency": [1e-6, "s", "not used here"]}
    cpu = Machine({"name": name, "device": "cpu", "ranks_per_node": 1, "shared": True, "exchange": "direct", "numbers": numbers})
    step = timeline.simulate(timeline.Job(model, cpu, 1, 4, T, 4, "fp32"))
    ratios.append(float(ms) * 1e-3 / (step.total - step.update))
if len(ratios) != 6:
    failed.append(f"dev/results/cpu_peers.md has {len(ratios)} cases, expected 6")

# The page prints what the model says.
page = open("dev/many_gpus.md").read()
for name, seconds in estimates.items():
    if name.startswith(("X", "saved")) and f"{seconds * 1e3:.1f}" not in page:
        failed.append(f"dev/many_gpus.md does not have {seconds * 1e3:.1f} ms, {name}")
if f"measured is {min(ratios):.2f} to {max(ratios):.2f} of it" not in page:
    failed.append(f"dev/many_gpus.md does not say {min(ratios):.2f} to {max(ratios):.2f} of CPU steps")
model, rows = "", re.findall(r"^\| ?([\w-]*) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) % \| ([\d.]+) \|$",
                             page, re.M)
if len(rows) != 18:
    failed.append(f"dev/many_gpus.md has {len(rows)} rows of times, expected 18")
batch = {"gpt2": 64, "gpt2-medium": 32, "gpt2-large": 32, "gpt2-xl": 16}
one = {}
for name, N, *printed in rows:
    model, N = name or model, int(N)
    job = timeline.Job(f.MODELS[model], machine, N, 64 * N, batch=batch[model], gathers="layer")
    step = timeline.simulate(job)
    one.setdefault(model, step.total)
    found = (step.total * 1e3, step.busy * 1e3, step.exposed * 1e3, step.newton_schulz * 1e3, 100 * one[model] / step.total,
             sum(timeline.memory(job).values()) / 1e9)
    for text, value in zip(printed, found):
        check(f"dev/many_gpus.md, {model} on {N}", value, float(text), 0.5 * 10.0 ** -len(text.partition(".")[2]) * 1.001)
print("\n".join(failed))
sys.exit(bool(failed))
PYTHON

# Errors are one line and status 2.
refused() {
  status=0
  python3 -B dev/plan/plan.py "$@" >/dev/null 2>"$work/error" || status=$?
  [ "$status" -eq 2 ] && [ "$(wc -l <"$work/error")" -eq 1 ] || { echo "plan.py $*: status $status"; cat "$work/error"; exit 1; }
}
refused --machine "$work/none.json"
refused --machine "$work/info"
refused
refused --machine dev/plan/machines/h200.json --model 9T
refused --machine dev/plan/machines/h200.json --gpus 0,1
refused --machine dev/plan/machines/h200.json --dtype fp32
sed 's/"datasheet: [^"]*"/""/' dev/plan/machines/h200.json >"$work/unsourced.json"
refused --machine "$work/unsourced.json"
grep -q 'has no source' "$work/error" || { cat "$work/error"; exit 1; }
# Predicted beside measured, on one rank; how fast it is does not matter here.
cat >"$work/cpu.json" <<'END'
{"name": "a test", "device": "cpu", "ranks_per_node": 2, "shared": true, "exchange": "direct", "numbers": {
  "products_fp32": [1e11, "FLOP/s", "no machine: a number for a test"], "memory": [2e10, "bytes/s", "the same"],
  "memory_size": [1e10, "bytes", "the same"], "inside_bandwidth": [5e9, "bytes/s", "the same"],
  "inside_latency": [1e-6, "s", "the same"]}}
END
python3 -B dev/plan/measure.py compare --program "$TRAIN_GPT" --machine "$work/cpu.json" --model gpt2-nano --ranks 1 --global-batch 2 \
  --batch-size 1 --seq-len 16 --steps 1 --json "$work/compared" >/dev/null
python3 - "$work/compared" <<'PYTHON'
import json, sys
result, = json.load(open(sys.argv[1]))["results"]
sys.exit(not (result["ranks"] == 1 and result["measured"]["step_ms"] > 0 and result["predicted"]["step_ms"] > 0
              and result["predicted"]["comm_bytes"] == 0))
PYTHON
if command -v gnuplot >/dev/null 2>&1; then
  plan --machine dev/plan/machines/h200.json --gpus 1,8 --plot "$work/plot.svg" >/dev/null
  [ -s "$work/plot.svg" ]
fi
[ "$(plan --csv --machine dev/plan/machines/h200.json --gpus 1,8 | wc -l)" -eq 3 ]
