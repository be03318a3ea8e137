"""What training on N GPUs will take: step time, exposed communication and memory, before any of them is bought.

  python3 dev/plan/plan.py --model 124M --gpus 1,8,64,512 --machine dev/plan/machines/h200.json
  ... --rows-per-gpu 64           a batch that grows with the GPUs, instead of --global-batch rows for any number of them
  ... --json | --csv              the same for programs;   --plot OUT.png: step time and efficiency against GPUs
  ... --formulas                  the volumes of the ways to share the optimizer's work out, and the work of every rank

The formulas are in formulas.py, the rule of owners in owners.py, the timeline in timeline.py; machines/ has the rates.
Standard library only.
"""
import argparse
import csv
import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import formulas as f  # noqa: E402
import owners  # noqa: E402
import timeline  # noqa: E402
from machine import Machine, MachineError  # noqa: E402

# Rows of a micro-batch that reference/gpu_kernels.md section 1.3 counts with, at T = 1024.
BATCH = {"gpt2": 64, "gpt2-medium": 32, "gpt2-large": 32, "gpt2-xl": 16}
COLUMNS = {  # key: (head, format)
    "gpus": ("GPUs", "{:d}"), "rows": ("rows", "{:d}"), "micro_batches": ("micro", "{:d}"), "step_ms": ("step ms", "{:.1f}"),
    "exposed_ms": ("exposed ms", "{:.2f}"), "busy_ms": ("comm ms", "{:.2f}"), "hidden_percent": ("hidden %", "{:.0f}"),
    "update_ms": ("update ms", "{:.2f}"), "newton_schulz_ms": ("NS ms", "{:.2f}"), "sent_mb": ("sent MB", "{:.1f}"),
    "messages": ("messages", "{:d}"), "tokens_per_second": ("tokens/s", "{:.3g}"), "efficiency_percent": ("eff. %", "{:.1f}"),
    "memory_gb": ("GB a GPU", "{:.2f}"), "fits": ("fits", "{}")}


class PlanError(Exception):
    """One line: what, which option, what to do."""


def find_model(text):
    name = f.SIZES.get(text.removeprefix("gpt2-"), text)
    if name not in f.MODELS:
        raise PlanError(f"no model is called {text}, --model, choose from {', '.join([*f.MODELS, *f.SIZES])}")
    return f.MODELS[name]


def numbers(option, text):
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise PlanError(f"{text!r} is no list of numbers above 0, {option}, write 1,8,64")
    return sorted(set(values))


def row(job):
    """One line of the table, without the efficiency, which needs another line."""
    step, memory = timeline.simulate(job), timeline.memory(job)
    total = sum(memory.values())
    return {"gpus": job.N, "rows": job.rows, "micro_batches": len(job.micro_batches), "step_ms": step.total * 1e3,
            "exposed_ms": step.exposed * 1e3, "busy_ms": step.busy * 1e3, "hidden_percent": 100 * step.hidden_share,
            "update_ms": step.update * 1e3, "newton_schulz_ms": step.newton_schulz * 1e3, "sent_mb": step.sent / 1e6,
            "messages": step.messages, "tokens_per_second": job.rows * job.T / step.total,
            "memory_gb": total / 1e9, "fits": "yes" if total <= job.machine.memory_size(job.N) else "no",
            "memory_bytes": {name: int(size) for name, size in memory.items()}}


def table(model, machine, o):
    """Lines for every number of GPUs; efficiency is tokens per second and GPU against those of one GPU with the same rows,
    or with rows of its own where the batch grows."""
    def job(N):
        rows = o.rows_per_gpu * N if o.rows_per_gpu else o.global_batch
        return timeline.Job(model, machine, N, rows, o.seq_len, o.batch_size or BATCH.get(model.name, 16), o.dtype,
                            o.gathers)

    one = row(job(1))["tokens_per_second"]
    lines = []
    for N in o.gpus:
        if job(N).rows < N:
            print(f"left out: {model.name} on {N} GPUs, a batch of {job(N).rows} rows has none for some of them "
                  "(--global-batch, or --rows-per-gpu)", file=sys.stderr)
            continue
        line = row(job(N))
        line["efficiency_percent"] = 100 * line["tokens_per_second"] / N / one
        lines.append({"model": model.name} | line)
    return lines


def print_text(lines):
    shown = [[head for head, _ in COLUMNS.values()]]
    shown += [[form.format(line[key]) for key, (_, form) in COLUMNS.items()] for line in lines]
    widths = [max(map(len, column)) for column in zip(*shown)]
    for words in shown:
        print("  ".join(word.rjust(width) for word, width in zip(words, widths)))


def print_csv(lines):
    writer = csv.DictWriter(sys.stdout, ["model", *COLUMNS], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)


def plot(path, lines, title):
    """Step time and efficiency against GPUs, a curve for each model."""
    names = list(dict.fromkeys(line["model"] for line in lines))
    blocks = "".join(f"$d{i} << E\n" + "\n".join(f"{x['gpus']} {x['step_ms']} {x['efficiency_percent']}" for x in lines
                                                 if x["model"] == name) + "\nE\n" for i, name in enumerate(names))

    def curves(column):
        return ", ".join(f"$d{i} using 1:{column} with linespoints lw 2 pt 7 ps 0.6 title '{name}'"
                         for i, name in enumerate(names))

    terminal = ("svg noenhanced size 900,420 font 'Helvetica,14' background rgb 'white'" if path.endswith(".svg")
                else "pngcairo noenhanced size 900,420 font 'Helvetica,11'")
    script = (f"{blocks}set terminal {terminal}\nset output '{path}'\nset logscale x 2\nset grid\nset xlabel 'GPUs'\n"
              f"set key left bottom\n"
              f"set multiplot layout 1,2\nset logscale y\nset title '{title}: step, ms'\nplot {curves(2)}\n"
              f"unset logscale y\nset yrange [0:*]\nset title 'efficiency, percent'\nplot {curves(3)}\n")
    try:
        done = subprocess.run(["gnuplot"], input=script, text=True, capture_output=True)
    except OSError:
        raise PlanError("gnuplot is missing, --plot, get it with: apt-get install gnuplot-nox") from None
    if done.returncode != 0:
        raise PlanError(f"gnuplot failed ({done.stderr.strip().splitlines()[-1]}), --plot {path}, choose a file that can be written")


def formulas_json(models, o):
    """What depends on no machine."""
    result = []
    for model in models:
        for N in o.gpus:
            ranks = owners.by_owner(owners.split(model, N), N)
            hidden = [sum(p.work for p in pieces if p.kind == "hidden") for pieces in ranks]
            result.append({
                "model": model.name, "gpus": N, "parameters": model.parameters,
                "flops_per_token": f.train_flops_per_token(model, o.seq_len),
                "newton_schulz_gflop": {"all": sum(hidden) / 1e9, "most": max(hidden) / 1e9, "least": min(hidden) / 1e9},
                "state_mb_mean": {"momentum": 4 * f.size_of(model, "hidden") / N / 1e6,
                                  "masters": 4 * model.parameters / N / 1e6,
                                  "adam": 8 * f.size_of(model, "rows", "vector") / N / 1e6},
                "mb_per_rank": {"bf16": f.scheme_bytes(model, N, 2), "fp32 gradients": f.scheme_bytes(model, N, 4)}})
    return result


def options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="124M", help="names or sizes, separated by commas: 124M,355M,774M,1558M")
    parser.add_argument("--gpus", default="1,2,4,8,16,32,64,128,256,512,1024")
    parser.add_argument("--machine", help="a file of dev/plan/machines, or one that measure.py made")
    parser.add_argument("--global-batch", type=int, default=512, help="rows of one update over all GPUs (512)")
    parser.add_argument("--rows-per-gpu", type=int, help="instead: rows of one update for each GPU")
    parser.add_argument("--batch-size", type=int, help="most rows of a micro-batch (64, 32, 32, 16 by model)")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--gathers", choices=("shape", "layer"), default="layer",
                        help="hidden weights travel per layer after all are updated (what train_gpt does), or per shape and layer")
    parser.add_argument("--formulas", action="store_true", help="what depends on no machine, as JSON")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true")
    how.add_argument("--csv", action="store_true")
    parser.add_argument("--plot", metavar="OUT.png", help="also draw step time and efficiency; .svg works, too")
    o = parser.parse_args(arguments)
    o.gpus = numbers("--gpus", o.gpus)
    for name in ("global_batch", "rows_per_gpu", "batch_size", "seq_len"):
        if getattr(o, name) is not None and getattr(o, name) < 1:
            raise PlanError(f"{getattr(o, name)} is not above 0, --{name.replace('_', '-')}, give a larger number")
    if not o.formulas and not o.machine:
        raise PlanError("no machine, --machine, give a file of dev/plan/machines")
    return o


def main(arguments):
    o = options(arguments)
    models = [find_model(name) for name in o.model.split(",")]
    if o.formulas:
        print(json.dumps(formulas_json(models, o), indent=1))
        return
    machine = Machine.read(o.machine)
    tables = [table(model, machine, o) for model in models]
    lines = sum(tables, [])
    if o.json:
        print(json.dumps({"machine": machine.data, "dtype": o.dtype, "seq_len": o.seq_len, "lines": lines}, indent=1))
    elif o.csv:
        print_csv(lines)
    else:
        for model, part in zip(models, tables):
            print(f"{model.name}, {machine.name}, {o.dtype}, rows of {o.seq_len} tokens")
            print_text(part)
    if o.plot:
        plot(o.plot, lines, machine.name)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (PlanError, MachineError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        sys.exit(2)
