"""Measures: a machine file for the computer at hand, and runs to hold the model against.

  python3 dev/plan/measure.py machine --program build/cpu/train_gpt --out cpu.json
  python3 dev/plan/measure.py compare --program build/cpu/train_gpt --machine cpu.json --model gpt2-small --ranks 1,2

`machine` times products, copies and Newton-Schulz with train_gpt, and the links with mpi_links.cpp over MPI. `compare` trains a
few steps on random tokens with every number of ranks, each with its part of the cores, and prints what log.jsonl says beside
what the timeline predicts. An idle machine, please. Standard library only.
"""
import argparse
import array
import datetime
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import formulas as f  # noqa: E402
import timeline  # noqa: E402
from machine import Machine, MachineError  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
VOCABULARY = 50257  # of shards without a tokenizer
WARM_UP = 3  # steps that find cold caches


class MeasureError(Exception):
    """One line: what, which option or program, what to do."""


def call(command, timeout=1800):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except OSError as error:
        raise MeasureError(f"cannot be started ({error.strerror}), {command[0]}, install or build it") from None
    except subprocess.TimeoutExpired:
        raise MeasureError(f"not done after {timeout} s, {shlex.join(command)}, take a smaller model") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise MeasureError(f"status {done.returncode} ({last}), {shlex.join(command)}, run it by hand")
    return done.stdout


def mpirun(ranks):
    """As root, and with more ranks than cores, OpenMPI wants to be told that this is meant."""
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["mpirun", *root, "--oversubscribe", "--bind-to", "none", "-np", str(ranks)] if ranks > 1 else []


def shard(folder):
    """Random tokens: as good as any for timing."""
    path = os.path.join(folder, "tokens.bin")
    tokens, generator = 1 << 16, random.Random(1)
    with open(path, "wb") as file:
        array.array("i", [20240520, 1, tokens] + [0] * 253).tofile(file)
        array.array("H", [generator.randrange(VOCABULARY) for _ in range(tokens)]).tofile(file)
    return path


def train(o, folder, ranks, options, steps):
    """The lines of log.jsonl of a short training."""
    out = tempfile.mkdtemp(dir=folder)
    tokens = shard(folder)
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    call(mpirun(ranks) + [o.program, "train", "--device", "cpu", "--dtype", "fp32", "--train", tokens, "--val", tokens, "--out",
                          out, "--steps", str(steps), "--val-every", "0", "--val-tokens", "1", "--keep", "1", *words])
    with open(os.path.join(out, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def median(lines, key):
    """Over the steps after the first few; None where the program does not say."""
    values = [line[key] for line in lines if line["type"] == "train" and line["step"] >= WARM_UP and key in line]
    return statistics.median(values) if values else None


def load():
    """Processor time that others took lately, in cores."""
    return os.getloadavg()[0]


# ------------------------------------------------------------------------------------------------------ a machine's rates

def newton_schulz_rate(o, folder):
    """A step on 16 tokens is nearly all update: Muon's less sgd's is Newton-Schulz."""
    model = f.MODELS["gpt2-small"]
    shape = {"model": model.name, "batch-size": 1, "seq-len": 16}
    seconds = [median(train(o, folder, 1, shape | {"hidden": rule}, WARM_UP + 5), "step_ms") / 1e3
               for rule in ("muon", "sgd:momentum=0.9")]
    flops = model.L * sum(f.newton_schulz_flops(rows, cols) for rows, cols in
                          [(model.C, model.C)] * 4 + [(4 * model.C, model.C)] * 2)
    if seconds[0] <= seconds[1]:
        raise MeasureError("Newton-Schulz took no time, machine, measure again on an idle computer")
    return flops / (seconds[0] - seconds[1])


def measure_machine(o):
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        run = train(o, folder, 1, {"model": "gpt2-nano", "batch-size": 1, "seq-len": 16}, 1)[0]
        rate = newton_schulz_rate(o, folder)
        program = os.path.join(folder, "links")
        call(["mpicxx", "-O2", "-std=c++20", os.path.join(HERE, "mpi_links.cpp"), "-o", program])
        links = json.loads(call(mpirun(2) + [program]))
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) * 1024
    when = f"measured {datetime.date.today()} by dev/plan/measure.py machine"
    log = f"{when}: log.jsonl of train_gpt {run['revision']}, load {load():.1f}"
    data = {"name": f"{cores} cores, {processor()}", "device": "cpu", "ranks_per_node": cores, "shared": True,
            "exchange": "direct", "numbers": {
                "products_fp32": [run["peak_flops"], "FLOP/s", log],
                "newton_schulz_fp32": [rate, "FLOP/s", f"{when}: steps of gpt2-small on 16 tokens, muon less sgd"],
                "memory": [run["copy_bytes_per_second"], "bytes/s", log],
                "memory_size": [memory, "bytes", f"{when}: /proc/meminfo"],
                "inside_bandwidth": [links["bandwidth"], "bytes/s", f"{when}: mpirun -np 2 links, messages of 1 MiB"],
                "inside_latency": [links["latency"], "s", f"{when}: mpirun -np 2 links, 8 bytes"]}}
    Machine(data)  # complete?
    with open(o.out, "w") as file:
        json.dump(data, file, indent=2)
        file.write("\n")
    print(f"{o.out}: {data['name']}")
    for key, (value, unit, _) in data["numbers"].items():
        print(f"  {key:<20} {value:.4g} {unit}")


def processor():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else "an unknown processor"


# ----------------------------------------------------------------------------------------------- predicted beside measured

def shares(rows, ranks, batch):
    """(rows of a micro-batch, micro-batches) of every rank."""
    if rows % ranks:
        raise MeasureError(f"{rows} rows are no multiple of {ranks} ranks, --global-batch, choose one")
    mine = rows // ranks
    count = next(count for count in range(1, mine + 1) if mine % count == 0 and mine // count <= batch)
    return mine // count, count


def compare(o):
    machine, model = Machine.read(o.machine), f.MODELS.get(o.model)
    if model is None:
        raise MeasureError(f"no model is called {o.model}, --model, choose from {', '.join(f.MODELS)}")
    cores = len(os.sched_getaffinity(0))
    print(f"{model.name}, {o.global_batch} rows of {o.seq_len} tokens, fp32, {machine.name}; load {load():.1f} before")
    print(f"{'ranks':>5}  {'what':<16} {'predicted':>11} {'measured':>11}  {'measured / predicted':>20}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in o.ranks:
            batch, count = shares(o.global_batch, ranks, o.batch_size)
            job = timeline.Job(model, machine, ranks, o.global_batch, o.seq_len, batch, "fp32", o.gathers)
            step = timeline.simulate(job)
            lines = train(o, folder, ranks, {"model": model.name, "batch-size": batch, "grad-accum": count, "seq-len": o.seq_len,
                                             "threads": max(1, cores // ranks)}, WARM_UP + o.steps)
            predicted = {"step_ms": step.total * 1e3, "comm_busy_ms": step.busy * 1e3, "comm_exposed_ms": step.exposed * 1e3,
                         "comm_bytes": step.sent}
            results.append({"ranks": ranks, "predicted": predicted, "measured": {key: median(lines, key) for key in predicted}})
            show(results[-1])
    if o.json:
        with open(o.json, "w") as file:
            json.dump({"machine": machine.data, "model": model.name, "rows": o.global_batch, "seq_len": o.seq_len,
                       "date": str(datetime.date.today()), "results": results}, file, indent=1)
            file.write("\n")


def show(result):
    for key, predicted in result["predicted"].items():
        measured = result["measured"][key]
        if measured is None:
            if result["ranks"] > 1:
                print(f"{result['ranks']:>5}  {key:<16} {predicted:>11.4g} {'not logged':>11}")
            continue
        ratio = f"{measured / predicted:.2f}" if predicted else "-"
        print(f"{result['ranks']:>5}  {key:<16} {predicted:>11.4g} {measured:>11.4g}  {ratio:>20}", flush=True)


def options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    machine = commands.add_parser("machine", help="write a machine file")
    machine.add_argument("--out", required=True)
    held = commands.add_parser("compare", help="train, and print predicted beside measured")
    held.add_argument("--machine", required=True)
    held.add_argument("--model", default="gpt2-small")
    held.add_argument("--ranks", default="1,2")
    held.add_argument("--global-batch", type=int, default=8, help="rows of one update")
    held.add_argument("--batch-size", type=int, default=8, help="most rows of a micro-batch")
    held.add_argument("--seq-len", type=int, default=256)
    held.add_argument("--steps", type=int, default=7, help="after three to warm up")
    held.add_argument("--gathers", choices=("shape", "layer"), default="layer", help="see plan.py")
    held.add_argument("--json", metavar="FILE", help="write the table there, too")
    for command in (machine, held):
        command.add_argument("--program", default="build/cpu/train_gpt")
    o = parser.parse_args(arguments)
    if o.command == "compare":
        try:
            o.ranks = [int(word) for word in o.ranks.split(",")]
        except ValueError:
            o.ranks = [0]
        if min(o.ranks) < 1:
            raise MeasureError("not a list of numbers above 0, --ranks, write 1,2")
    return o


if __name__ == "__main__":
    try:
        chosen = options(sys.argv[1:])
        measure_machine(chosen) if chosen.command == "machine" else compare(chosen)
    except (MeasureError, MachineError) as error:
        print(f"measure.py: error: {error}", file=sys.stderr)
        sys.exit(1)
