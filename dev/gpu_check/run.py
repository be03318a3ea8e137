"""Everything that only a GPU can show, in one call: see dev/gpu_check.sh.

Each stage is a function that runs our own programs and returns figures; it has a budget of seconds, is stopped when it
overruns, and fails alone: what follows still runs, and the report says what happened. Correctness comes first.
Standard library only.
"""
import argparse
import array
import datetime
import glob
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time

import ranks as several
import report
import suites
from programs import build
from tools import ROOT, Failed, Skipped, Tools

# The tests of what runs on a GPU, and of every PTX wrapper bit by bit.
GPU_TESTS = "*Gpu*:*Streams*:Wrappers.*:ModelInBf16.*"
# Those of them that start the program, or several ranks of it.
PROGRAM_TESTS = "ProgramOnGpu.*:ProgramRanksOnGpu.*:QkClipOnGpu.*:*ProgramNorms*"
# What the trainer does not run yet, and may hang.
LAB_TESTS = "Hopper.*"
# Small enough for a checker that slows kernels down a hundredfold.
SANITIZED_TESTS = "GpuF32.*=1,T=3,C=16*:GpuBf16.*T=5,C=33*:GpuBf16.matmul/M=7*:GpuBf16.cross_entropy/N=5*:*GpuAttention*"


# --------------------------------------------------------------------------------------------------------- the stages

def machine(tools):
    """Names and versions of what the figures were measured on."""
    found = {"python": sys.version.split()[0], "cores": len(os.sched_getaffinity(0))}
    with open("/proc/meminfo") as file:
        found["memory_gib"] = round(int(file.readline().split()[1]) / 2**20)
    if shutil.which("nvcc"):
        found["nvcc"] = re.search(r"release ([\d.]+)", tools.run(["nvcc", "--version"], name="nvcc")).group(1)
    if shutil.which("git"):
        revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        found["revision"] = revision.stdout.strip() or "unknown"
    if shutil.which("nvidia-smi"):
        fields = ["name", "driver_version", "memory.total", "clocks.max.sm", "power.limit", "persistence_mode"]
        line = tools.run(["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader"])
        found.update(zip(fields, (value.strip() for value in line.splitlines()[0].split(","))))
    elif not tools.o.self_test:
        raise Failed("no nvidia-smi: is there a GPU?", found)
    return found


def gtest(tools, filter_, prefix=(), patience=30):
    tools.env["TRAIN_GPT"] = tools.env["TRAIN_GPT_GPU"] = tools.program("train_gpt")
    log = tools.log()
    done = suites.run(tools.program("tests/all"), filter_, log, tools.env, tools.stage_until, patience, prefix)
    counts = {"tests": len(done.passed) + len(done.skipped) + len(done.failed), "failed": list(done.failed)[:50],
              "said": dict(list(done.failed.items())[:20]), "skipped": len(done.skipped), "not_run": len(done.left)}
    if done.failed:
        name, why = next(iter(done.failed.items()))
        raise Failed(f"{len(done.failed)} of {counts['tests']} tests failed, the first: {name}: {why}"[:400], counts)
    if done.left:
        raise Failed(f"{len(done.left)} tests did not run, {counts['tests']} did", counts)
    if not counts["tests"]:
        raise Failed(f"no test matches {filter_}")
    return counts


def gpu_tests(tools):
    """Every CUDA half against its float64 oracle, every PTX wrapper bit by bit: the same test program as everywhere."""
    return gtest(tools, tools.size(f"{GPU_TESTS}-{PROGRAM_TESTS}", "GpuF32.gelu*:GpuBf16.gelu*"))


def lab_tests(tools):
    """TMA, mbarriers and wgmma, which only candidates in dev/lab use."""
    return gtest(tools, LAB_TESTS, patience=15)


def program_tests(tools):
    """The program on the GPU from the outside: it learns what the CPU learns, resumes to the bit, ranks share the GPU."""
    return gtest(tools, tools.size(PROGRAM_TESTS, "ProgramOnGpu.ResumeEquals*"), patience=90)


def all_tests(tools):
    """The rest of the test program on this machine."""
    if tools.o.self_test:
        raise Skipped("make test runs them")
    return gtest(tools, f"-{GPU_TESTS}:{PROGRAM_TESTS}:{LAB_TESTS}:*Kill*", patience=60)


def sanitized(tools, tool):
    if tools.o.self_test:
        raise Skipped("compute-sanitizer needs a GPU")
    if not shutil.which("compute-sanitizer"):
        raise Skipped("compute-sanitizer is not installed")
    counts = gtest(tools, SANITIZED_TESTS, patience=60,
                   prefix=["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"])
    with open(tools.log(), errors="replace") as file:
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", file.read())
    if not summary:
        raise Failed("compute-sanitizer gave no summary", counts)
    wrong = [line for line in summary if not re.search(r"SUMMARY: 0 (errors|hazards)", line)]
    if wrong:
        raise Failed(wrong[0], counts)
    return counts | {"summary": summary[-1]}


def memcheck(tools):
    """compute-sanitizer: accesses outside of allocations."""
    return sanitized(tools, "memcheck")


def racecheck(tools):
    """compute-sanitizer: missing barriers."""
    return sanitized(tools, "racecheck")


def harness(tools, arguments, dtype, variant=None):
    """The harness writes its results as it goes: what it had when it was stopped counts. A case that takes the GPU from the
    process fails all that follow, so another process goes on behind it."""
    rest = tools.run([tools.program("harness"), "--names", *arguments], name="names").splitlines()
    figures, stopped = None, None
    while rest and not stopped:
        cases, result = (os.path.join(tools.work, f"{tools.stage}.{kind}") for kind in ("cases", "json"))
        with open(cases, "w") as file:
            file.write("\n".join(rest) + "\n")
        if os.path.exists(result):
            os.remove(result)
        text = ""
        try:
            text = tools.run([tools.program("harness"), "--device", "cuda", "--dtype", dtype, "--json", result,
                              "--seconds", str(tools.size(0.2, 0.001)), "--cases", cases,
                              *(["--variant", variant] if variant else [])], check=False)
        except Failed as failure:
            stopped = str(failure)
        if not os.path.exists(result):
            stopped = stopped or "the harness ended early: " + " / ".join(text.strip().splitlines()[-2:])
            break
        with open(result) as file:
            part = json.load(file)
        lost = next((i for i, row in enumerate(part["results"]) if suites.LOST.search(row.get("failure", ""))), None)
        results = part["results"] if lost is None else part["results"][:lost + 1]
        rest = [] if lost is None else rest[rest.index(results[lost]["case"]) + 1:]
        figures = figures or part | {"results": []}
        figures["results"] += results
    if not figures:
        raise Failed(stopped or "the harness knows no such case")
    wrong = [row["case"] for row in figures["results"] if "failure" in row]
    if wrong:
        raise Failed(f"{len(wrong)} of {len(figures['results'])} wrong, the first: {wrong[0]}", figures)
    if stopped:
        raise Failed(f"{stopped}, after {len(figures['results'])} cases", figures)
    return figures


def gemm_cases(tools):
    """The products of GPT-2 124M at 65536 tokens, as the harness wants them."""
    sizes = tools.size([], ["--tokens", "32", "--channels", "16", "--vocab", "128", "--chunk", "16"])
    path = os.path.join(tools.work, "gemm_cases.txt")
    shapes = subprocess.run([sys.executable, os.path.join(ROOT, "dev/gpu_check/gemm_shapes.py"), *sizes],
                            capture_output=True, text=True, check=True)
    with open(path, "w") as file:
        file.write(shapes.stdout)
    return ["--cases", path]


def gemm(tools):
    """cuBLASLt on the products of GPT-2 124M at 65536 tokens."""
    return harness(tools, gemm_cases(tools), "bf16", "shipped")


def gemm_lab(tools):
    """Candidates beside it, which may hang."""
    return harness(tools, gemm_cases(tools), "bf16")


OP_SIZES = ("B=64,T=1024,C=768,NH=12,V=50257,chunk=8192", "B=1,T=8,C=32,NH=2,V=200,chunk=8")


def ops_bf16(tools):
    """Every operation of a training step of GPT-2 124M, 64 x 1024 tokens, bf16, against this GPU's rooflines."""
    return harness(tools, ["--shape", tools.size(*OP_SIZES)], "bf16", "shipped")


def ops_fp32(tools):
    """The same in fp32, 8 x 1024 tokens."""
    sizes = OP_SIZES[0].replace("B=64", "B=8").replace("chunk=8192", "chunk=2048")
    return harness(tools, ["--shape", tools.size(sizes, OP_SIZES[1])], "fp32", "shipped")


def random_shard(path, tokens, vocab):
    """A token shard (256 int32 of header, then uint16 ids) of random ids, the same every time."""
    state, ids = 1, array.array("H")
    for _ in range(tokens):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocab)
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", 20240520, 1, tokens, *[0] * 253))
        ids.tofile(file)


def text_shards(tools):
    """Shards of real text that is always at hand: our own sources, as bytes."""
    folder, text = os.path.join(tools.work, "text"), os.path.join(tools.work, "text.txt")
    if not os.path.isdir(folder):
        with open(text, "w") as file:
            for name in sorted(glob.glob(os.path.join(ROOT, "model/**/*.cpp"), recursive=True)):
                with open(name) as source:
                    file.write(source.read())
        tools.run([tools.program("train_gpt"), "prepare", "--text", text, "--out", folder], name="prepare")
    return os.path.join(folder, "train_*.bin")


def read_log(folder):
    with open(os.path.join(folder, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


class FirstStep(threading.Thread):
    """Watches a run's log: how long after now the first step's line is there."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.path, self.begin, self.seconds, self.over = path, time.monotonic(), None, False
        self.start()

    def run(self):
        while not self.over:
            if os.path.exists(self.path):
                with open(self.path, errors="replace") as file:
                    if '"type":"train"' in file.read().replace(" ", ""):
                        self.seconds = time.monotonic() - self.begin
                        return
            time.sleep(0.002)

    def finish(self):
        """Seconds since the beginning, when the run is over."""
        seconds = time.monotonic() - self.begin
        self.over = True
        self.join()
        return seconds


def train(tools):
    """The program itself: GPT-2 124M, 64 x 1024 tokens a step, from its launch."""
    B, T, steps = tools.size((64, 1024, 20), (1, 8, 2))
    if tools.o.self_test:  # bytes: a small vocabulary
        shard = text_shards(tools)
    else:
        shard = os.path.join(tools.work, "train_000000.bin")
        random_shard(shard, B * T * 4 + 1, 50257)
    figures = {}
    # The first run chooses the ways of its matrix products; the last finds them chosen, as every later run does.
    for name, recipe, count in (("default", [], steps), ("adamw", ["--recipe", "adamw"], steps), ("default again", [], 3)):
        folder = os.path.join(tools.work, f"train-{name.replace(' ', '-')}")
        first = FirstStep(os.path.join(folder, "log.jsonl"))
        tools.run([tools.program("train_gpt"), "train", "--train", shard, "--val", shard, "--out", folder,
                   "--model", tools.size("gpt2", "gpt2:layers=1,channels=16,heads=1,positions=8"), "--device", "cuda",
                   "--dtype", "bf16", "--batch-size", str(B), "--seq-len", str(T), "--steps", str(count),
                   "--val-tokens", str(T), "--checkpoint-every", "0", *recipe])
        seconds = first.finish()
        log = read_log(folder)
        shutil.rmtree(folder)  # a checkpoint of 1.5 GB
        steps_ms = [line["step_ms"] for line in log if line["type"] == "train"]
        losses = [line["loss"] for line in log if line["type"] == "train"]
        settled = statistics.median(steps_ms[min(5, len(steps_ms) - 1):])
        figures[name] = {"step_ms": settled, "tokens_per_second": 1e3 * B * T / settled, "first_step_ms": steps_ms[0],
                         "launch_to_first_step_seconds": first.seconds, "first_loss": losses[0], "last_loss": losses[-1],
                         "whole_run_seconds": seconds}
    return {"batch_size": B, "seq_len": T, "steps": steps, "recipes": figures}


def phases(tools):
    """Where a step's time goes, per operation, against the floor of this GPU."""
    if tools.o.self_test:
        raise Skipped("no executor needs this: dev/bench is the same program on every device")
    line = tools.run([tools.program("dev/bench"), "--model", "gpt2", "--batch-size", "64", "--seq-len", "1024", "--vocab",
                      "50257", "--recipe", tools.o.recipe, "--device", "cuda", "--dtype", "bf16", "--json"])
    return json.loads(line.strip().splitlines()[-1])


def pytorch(tools):
    """The same step in PyTorch: compiled, flash attention, bf16; AdamW and torch.optim.Muon."""
    command = [tools.o.python, os.path.join(ROOT, "dev/gpu_check/pytorch_peer.py")]
    if subprocess.run([tools.o.python, "-c", "import torch"], capture_output=True).returncode != 0:
        raise Skipped(f"{tools.o.python} has no torch")
    if tools.o.self_test:
        command += ("--device cpu --no-compile --layers 1 --channels 16 --heads 1 --vocab 100 --batch-size 1 "
                    "--seq-len 8 --steps 2 --warmup 1").split()
    try:
        text = tools.run(command, own_libraries=False)
    except Failed as failure:  # what was measured before it was stopped still counts
        with open(tools.log(), errors="replace") as file:
            text = file.read()
        if '{"torch"' not in text:
            raise failure
    return json.loads([line for line in text.splitlines() if line.startswith('{"torch"')][-1])


def parity(tools):
    """One small model, one seed, three runs: CPU fp32, GPU fp32, GPU bf16. The losses must stay together."""
    shards = text_shards(tools)
    B, T, steps = tools.size((16, 128, 100), (1, 8, 2))
    model = tools.size("gpt2-micro", "gpt2-nano:layers=1,channels=16,heads=1")
    curves = {}
    for device, dtype in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16")):
        folder = os.path.join(tools.work, f"parity-{device}-{dtype}")
        tools.run([tools.program("train_gpt"), "train", "--train", shards, "--val", shards, "--out", folder, "--model", model, "--batch-size", str(B), "--seq-len", str(T), "--steps",
                   str(steps), "--device", device, "--dtype", dtype, "--val-tokens", str(T * B)])
        curves[f"{device} {dtype}"] = [line["loss"] for line in read_log(folder) if line["type"] == "train"]
    far = lambda name: max(abs(a - b) for a, b in zip(curves["cpu fp32"], curves[name]))
    figures = {"curves": curves, "largest_difference_fp32": far("cuda fp32"), "largest_difference_bf16": far("cuda bf16"),
               "allowed_fp32": 0.01, "allowed_bf16": 0.1}
    for dtype in ("fp32", "bf16"):
        if not figures[f"largest_difference_{dtype}"] <= figures[f"allowed_{dtype}"]:
            raise Failed(f"{dtype} losses differ by {figures[f'largest_difference_{dtype}']:.4f} from the CPU's", figures)
    return figures


def ranks(tools):
    """NCCL with one rank; one, two and three ranks that share the GPU over MPI: the same losses."""
    figures = {"nccl": gtest(tools, "*Comm*")} if not tools.o.self_test else {}
    mpirun = several.find_mpirun(tools.build)
    if not mpirun:
        raise Skipped("there is no mpirun here, and none was carried")
    shards = text_shards(tools)
    sizes = tools.size({"rows": 24, "T": 128, "steps": 30}, {"rows": 6, "T": 8, "steps": 2})

    for dtype, allowed in (("fp32", 1e-5), ("bf16", 1e-3)):
        def run(count, options):
            folder = os.path.join(tools.work, f"ranks-{dtype}-{count}")
            tools.run([*several.command(mpirun, count), tools.program("train_gpt"), "train", "--train", shards, "--val", shards,
                       "--out", folder, "--model", tools.size("gpt2-micro", "gpt2-nano:layers=1,channels=16,heads=1"), "--device", "cuda",
                       "--dtype", dtype, "--val-tokens", str(sizes["T"]), *options], name=f"{dtype}-{count}")
            return read_log(folder)

        figures[dtype] = {"losses": several.curves(run, sizes), "allowed": allowed}
        figures[dtype]["far"] = several.far(figures[dtype]["losses"])
        if not figures[dtype]["far"] <= allowed:
            raise Failed(f"{dtype} losses of several ranks differ by {figures[dtype]['far']:.1e} from those of one", figures)
    return figures


# Seconds are what each may take; the sum may pass the limit, because most need far less.
# Should the time not be enough, what is known from elsewhere or changes least is last.
STAGES = [(machine, 15), (build, 240), (gpu_tests, 120), (parity, 60), (train, 75), (phases, 45), (gemm, 60), (pytorch, 150),
          (ops_bf16, 90), (program_tests, 90), (memcheck, 45), (ranks, 60), (lab_tests, 60), (gemm_lab, 60), (racecheck, 45),
          (ops_fp32, 60), (all_tests, 120)]


def run_stages(tools, results, after_each):
    """Fills `results` stage by stage."""
    for stage, seconds in STAGES:
        name = stage.__name__
        if (tools.o.only and name not in tools.o.only + ["machine", "build"]) or name in tools.o.skip:
            continue
        start = time.monotonic()
        tools.stage, tools.stage_until = name, min(tools.until, start + seconds)
        print(f"{name}: {stage.__doc__}", flush=True)
        try:
            if start >= tools.until:
                raise Skipped("the time is used up")
            outcome = {"status": "ok", "figures": stage(tools)}
        except Skipped as why:
            outcome = {"status": "skipped", "why": str(why)}
        except Exception as why:  # a stage fails alone, whatever happened in it
            outcome = {"status": "failed", "why": str(why) if isinstance(why, Failed) else repr(why)}
            if getattr(why, "figures", None):
                outcome["figures"] = why.figures
        outcome["seconds"] = round(time.monotonic() - start, 1)
        results[name] = outcome
        print(f"  {outcome['status']} ({outcome['seconds']} s) {outcome.get('why', '')}", flush=True)
        after_each()


def parse_options():
    names = [stage.__name__ for stage, _ in STAGES]
    parser = argparse.ArgumentParser(prog="dev/gpu_check.sh", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deps", metavar="PATH", help="build/gpu-deps.tar.xz or its folder, where packages are missing")
    parser.add_argument("--out", default="build/gpu-check", metavar="DIR", help="for the report and the logs")
    parser.add_argument("--keep", action="store_true", help="also copy the report to dev/results/")
    parser.add_argument("--build", metavar="DIR", help="build folder (default build/cuda)")
    parser.add_argument("--rebuild", action="store_true", help="build here even if --deps carries programs")
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="STAGE", help=", ".join(names))
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="STAGE")
    parser.add_argument("--recipe", default="adamw", help="of the phase table")
    parser.add_argument("--time-limit", type=float, default=560, metavar="SECONDS", help="for all stages together")
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch")
    parser.add_argument("--self-test", action="store_true",
                        help="tiny sizes in the executor of dev/cuda_on_cpu: tests this script, needs no GPU")
    o = parser.parse_args()
    o.build = o.build or ("build/sim" if o.self_test else "build/cuda")
    return o


def main():
    o = parse_options()
    tools = Tools(o)
    start, results, paths = time.time(), {}, []
    record = {"date": datetime.date.today().isoformat(), "self_test": o.self_test, "stages": results}

    def write_report():  # after every stage: a run that is killed leaves what it had
        record["seconds"] = round(time.time() - start, 1)
        paths[:] = report.write(record, tools.out)

    run_stages(tools, results, write_report)
    shutil.rmtree(tools.work)
    if o.keep:
        for path in paths:
            shutil.copy(path, os.path.join(ROOT, "dev/results"))
    with open(paths[0]) as file:
        print("\n" + file.read())
    print(f"report: {' '.join(paths)}; logs: {tools.logs}")
    return any(outcome["status"] == "failed" for outcome in results.values())


if __name__ == "__main__":
    sys.exit(main())
