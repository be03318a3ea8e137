"""Trainings as values: a dict of options in, a Result out.

    lab = Lab(program="build/cpu/train_gpt", folder="out/anthology")
    first, second = lab.train([{"hidden": "muon:lr=0.02", "steps": 100, ...}, {...}], what="race")
    first.loss, first.seconds, first.curve("val"), first.weights(100)

A training lies in a folder that is named by the hash of its options, so what was trained once is read the next time, and an
interrupted `make anthology` goes on. Two trainings run at a time, each with one thread: such small models gain little from
a second one. Nothing here computes a gradient; that is train_gpt's.
"""
import concurrent.futures
import hashlib
import json
import math
import os
import pathlib
import shlex
import shutil
import statistics
import struct
import subprocess
import time

# What all trainings share unless they say otherwise: 0.1M parameters, 1024 bytes a step.
BASE = {"model": "gpt2-nano", "batch-size": 16, "seq-len": 64, "shuffle": True, "val-every": 0, "val-tokens": 32768,
        "device": "cpu", "threads": 1}
# Added to them when they only test the scripts.
TINY = {"batch-size": 2, "seq-len": 32, "val-tokens": 256}
# A training whose only step has length zero: it leaves the initial weights.
START = {"steps": 1, "keep": 1} | {
    role: "sign:lr=0" for role in ("hidden", "embedding", "position", "vector")}


class Stopped(Exception):
    """A training ended for a reason that is neither divergence nor a rule that this program lacks."""


class Result:
    """What one training said and left. A training that diverged has loss = inf and says why in `failed`."""

    def __init__(self, options, command, folder):
        self.options, self.command, self.folder = options, command, folder
        self.failed = read_text(folder / "failed")
        self.log = [json.loads(line) for line in read_text(folder / "log.jsonl").splitlines()]
        end = self.lines("end")
        complete = end and not self.failed
        loss = end[0]["val_loss"] if complete else math.inf
        self.loss = loss if math.isfinite(loss) else math.inf  # on the validation data, after the last step
        # Of the processor, one thread: what else the machine did meanwhile does not count.
        self.seconds = float(read_text(folder / "cpu_seconds") or "nan") if complete else math.nan

    def lines(self, kind):
        return [line for line in self.log if line["type"] == kind]

    def curve(self, kind, key="loss"):
        """(steps, values) of the `train` or `val` lines."""
        lines = self.lines(kind)
        return [line["step"] for line in lines], [line[key] for line in lines]

    def seconds_at(self, steps):
        """Seconds of the processor before each of these steps: all steps of a rule take about the same."""
        return [self.seconds * step / int(self.options["steps"]) for step in steps]

    def weights(self, step):
        """{name: (shape, numbers)} of the checkpoint after `step`; needs the option keep."""
        return read_safetensors(self.folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")

    def initial_weights(self):
        """Those of a START training: its only step has length zero."""
        return self.weights(1)

    def record(self):
        """What is kept of this training beside the page."""
        data = pathlib.Path(self.options["train"]).parent.name
        shown = {"data": data, "options": shorten(self.options), "loss": significant(self.loss),
                 "seconds": significant(self.seconds)}
        return shown | ({"failed": self.failed} if self.failed else {})


class Lab:
    """Runs trainings of one program, `at_once` at a time, and remembers them in `folder`."""

    def __init__(self, program, folder, quick=False, at_once=None):
        self.program, self.folder, self.quick = program, pathlib.Path(folder), quick
        self.at_once = at_once or min(2, os.cpu_count() or 1)
        self.base = BASE | (TINY if quick else {})
        self.rate = None  # work() per second of one training, once measured
        self.revisions = set()
        self.skipped = []  # (what, why)

    def prepare(self, text, name, val_fraction=0.01):
        """Tokens of a text file; returns the options that name them."""
        out = self.folder / "data" / name
        if not any(out.glob("train_*.bin")):
            out.mkdir(parents=True, exist_ok=True)
            call([self.program, "prepare", "--text", str(text), "--out", str(out), "--val-fraction", str(val_fraction)])
        return {"train": f"{out}/train_*.bin", "val": f"{out}/val_*.bin"}

    def train(self, option_dicts, what):
        """The Results of these trainings, in their order; makes those that are not there yet."""
        plans = [self._plan(options) for options in option_dicts]
        waiting = {folder: (options, command) for options, command, folder in plans if not is_done(folder, options)}
        if waiting:
            self._announce(waiting, len(plans), what)
            self._make(waiting, what)
        results = [Result(*plan) for plan in plans]
        self.revisions |= {line["revision"] for result in results for line in result.lines("run")}
        return results

    def skip(self, what, why):
        print(f"left out: {what}: {why}", flush=True)
        self.skipped.append((what, why))

    def _plan(self, options):
        command = [self.program, "train"] + words(options)
        key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]
        return options, command, self.folder / "runs" / key

    def _announce(self, waiting, total, what):
        """The plan and its time, before anything starts."""
        if self.rate is None:
            self.rate = self._measure_rate(next(iter(waiting.values()))[0])
        seconds = sum(work(options) for options, _ in waiting.values()) / self.rate / self.at_once
        print(f"{what}: {len(waiting)} trainings to make, {total - len(waiting)} already there; about {clock(seconds)} "
              f"({self.at_once} at a time)", flush=True)

    def _measure_rate(self, options):
        """Of short trainings at the same time, as the real ones will run."""
        steps = 5 if self.quick else 30
        plans = [self._plan(options | {"steps": steps, "val-every": 0, "seed": 90001 + i}) for i in range(self.at_once)]
        start = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(lambda plan: self._make_one(*plan), plans))
        return work(plans[0][0]) / (time.monotonic() - start)

    def _make(self, waiting, what):
        total = sum(work(options) for options, _ in waiting.values())
        done, start, said = 0, time.monotonic(), time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(self.at_once) as pool:
            # The longest first, so that nothing long is left over for one core at the end.
            order = sorted(waiting.items(), key=lambda item: -work(item[1][0]))
            futures = {pool.submit(self._make_one, options, command, folder): options
                       for folder, (options, command) in order}
            try:
                for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    future.result()
                    done += work(futures[future])
                    if time.monotonic() - said > 20:
                        said = time.monotonic()
                        left = (said - start) * (total - done) / done
                        print(f"{what}: {count} of {len(waiting)}, {clock(left)} left", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _make_one(self, options, command, folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "command").write_text(shlex.join(command) + "\n")
        process = subprocess.Popen(command + ["--out", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        message = process.stderr.read().strip().replace("train_gpt: error: ", "")
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        (folder / "cpu_seconds").write_text(str(usage.ru_utime + usage.ru_stime))
        if "keep" not in options:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if code == 2 or (code == 1 and "finite" in message):
            (folder / "failed").write_text(("refused: " if code == 2 else "diverged: ") + message)
        elif code != 0:
            raise Stopped(f"{message or 'stopped'} (exit status {code})\n  {shlex.join(command)} --out {folder}")


def words(options):
    """{"model": "gpt2-nano", "shuffle": True, "set": ["a=b"]} as a command line."""
    line = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not False:
                line += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    return line


def shorten(options):
    """The command line without what every training has: data, device and threads."""
    common = {"train", "val", "device", "threads"}
    return shlex.join(words({name: value for name, value in options.items() if name not in common}))


def is_done(folder, options):
    if (folder / "failed").exists():
        # What an older program refused, a newer one may know.
        return not read_text(folder / "failed").startswith("refused")
    last = read_text(folder / "log.jsonl").splitlines()[-1:]
    return bool(last) and last[0].startswith('{"type":"end"') and json.loads(last[0])["step"] == int(options["steps"])


def work(options):
    """Floating-point operations of the products of a training, roughly; to compare trainings with each other."""
    sizes = {"gpt2-nano": (3, 48), "gpt2-micro": (4, 128), "gpt2-mini": (6, 192)}
    name, _, keys = options["model"].partition(":")
    keyed = dict(key.split("=") for key in keys.split(",") if key)
    layers, channels = int(keyed.get("layers", sizes[name][0])), int(keyed.get("channels", sizes[name][1]))
    weights = 12 * layers * channels**2 + 257 * channels
    tokens = int(options["batch-size"]) * int(options["seq-len"])
    validations = 1 + (int(options["steps"]) // int(options["val-every"]) if int(options.get("val-every", 0)) else 1)
    starting = 2e9  # loading, measuring the machine, writing
    return starting + 6 * weights * tokens * int(options["steps"]) + 2 * weights * int(options["val-tokens"]) * validations


def call(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Stopped(f"{done.stderr.strip()}\n  {shlex.join(command)}")
    return done.stdout


def read_text(path):
    return path.read_text() if path.exists() else ""


def read_safetensors(path):
    """{name: (shape, list of numbers)} of a file of float32 tensors."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, tensors = json.loads(data[8:8 + size]), {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = (entry["shape"], struct.unpack(f"<{(end - begin) // 4}f", data[begin:end]))
    return tensors


def mean_and_error(values):
    """Mean and its standard error."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    if not all(map(math.isfinite, values)):
        return math.inf, math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def significant(x, digits=5):
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None


def clock(seconds):
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
