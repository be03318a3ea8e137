#!/usr/bin/env python3
"""Training speed and memory on the CPU, side by side with PyTorch.

One step is a forward and a backward pass of GPT-2 in float32 on one batch of random tokens, then AdamW. The same
shapes and the same number of threads run in PyTorch (eager and torch.compile) and in the programs given by --ours
and --peer. Only the comparison needs PyTorch; a current one, in an environment of its own:

  python3 -m venv build/venv-torch && build/venv-torch/bin/pip install torch numpy     # about 5 GB
  build/venv-torch/bin/python dev/compare_pytorch.py --shape gpt2:4x64 --ours 'COMMAND'

How the comparison stays fair on a machine that is never quite alone:
- Every measurement is one fresh process that knows one mode and one shape, so its peak memory is its own.
- A round runs every competitor once, one after the other; the next round runs them in the opposite order. Ratios are
  taken within a round, and the median over rounds is reported, so that slow drift of the machine cancels.
- A product of 1024 x 3072 x 768 is timed by PyTorch in every PyTorch process, just before and after its steps; the
  column "of sgemm" is the model's rate over that product's rate.
- The column "others" says how many cores, on average, other programs kept busy meanwhile: read no line above 0.1.
- PyTorch gets its better optimizer (--adamw auto tries fused and foreach on the model's own tensors) and can be given
  an allocator that keeps its pages (--keep-pages), which glibc by default returns to the kernel at every step.

COMMAND may name {layers} {channels} {heads} {vocab} {batch_size} {seq_len} {threads} {steps}; it prints, on a line of
its own, {"forward_backward_ms": 1.5, "optimizer_ms": 0.5, "peak_rss_mb": 100.0}: medians over the steps after warm-up.
"""
import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

# name: layers, channels, heads, vocabulary (as stored: padded to a multiple of 128)
MODELS = {
    "gpt2": (12, 768, 12, 50304),
    "6-layer": (6, 384, 6, 50304),
    "6-layer-bytes": (6, 384, 6, 256),
}
ALL_SHAPES = [f"{model}:4x{seq_len}" for model in ("6-layer-bytes", "6-layer", "gpt2") for seq_len in (64, 256)]


# ---------------------------------------------------------------------------------------------------------------------
# The PyTorch competitor. Runs in a child process: everything below here until "The race" may import torch.


def build_gpt2(shape):
    """GPT-2 as OpenAI's: learned positions, biases, LayerNorm 1e-5, tanh GELU, head tied to the embedding."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    C, NH = shape["channels"], shape["heads"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(C, eps=1e-5), nn.LayerNorm(C, eps=1e-5)
            self.qkv, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.fc, self.mlp_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = (t.view(B, T, NH, C // NH).transpose(1, 2) for t in self.qkv(self.ln_1(x)).split(C, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
            return x + self.mlp_proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))

    class GPT2(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(shape["vocab"], C), nn.Embedding(shape["seq_len"], C)
            self.blocks = nn.ModuleList(Block() for _ in range(shape["layers"]))
            self.ln_f = nn.LayerNorm(C, eps=1e-5)
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.ln_f(x), self.wte.weight)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    return GPT2()


def choose_adamw(parameters, wanted):
    """The faster of PyTorch's two AdamW implementations for these tensors, unless one is asked for by name."""
    import torch

    kinds = ("fused", "foreach") if wanted == "auto" else (wanted,)
    seconds = {}
    for kind in kinds if len(kinds) > 1 else ():
        # Sixteen tensors are enough to rank the two, without a second full set of moments in the peak memory.
        sample = [torch.nn.Parameter(p.detach().clone()) for p in parameters[-16:]]
        optimizer = torch.optim.AdamW(sample, **{kind: True})
        for p in sample:
            p.grad = torch.randn_like(p)
        seconds[kind] = min(timed(optimizer.step) for _ in range(5))
    best = min(seconds, key=seconds.get) if seconds else kinds[0]
    return torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, **{best: True}), best


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sgemm_gflops(seconds=0.4):
    """Rate of PyTorch's own 1024 x 3072 x 768 product, (out, in) weights as in every layer of GPT-2."""
    import torch

    M, N, K = 1024, 3072, 768
    a, w, out = torch.randn(M, K), torch.randn(N, K), torch.empty(M, N)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        times.append(timed(lambda: torch.mm(a, w.t(), out=out)))
    return 2e-9 * M * N * K / statistics.median(times)


def peak_rss_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def run_child(job):
    """One mode, one shape: prints one JSON line."""
    try:
        import torch
    except ImportError as error:
        sys.exit(f"compare_pytorch: {sys.executable} cannot import torch ({error}); see the top of this file")
    shape = job["shape"]
    torch.set_num_threads(job["threads"])
    torch.manual_seed(1)
    rss_import = peak_rss_mb()
    model = build_gpt2(shape)
    sgemm_before = sgemm_gflops()
    optimizer, adamw = choose_adamw(list(model.parameters()), job["adamw"])
    loss_of = torch.compile(model) if job["mode"] == "compile" else model
    size = (shape["batch_size"], shape["seq_len"])

    forward_backward, update = [], []
    for step in range(job["warmup"] + job["steps"]):
        tokens, targets = torch.randint(shape["vocab"], size), torch.randint(shape["vocab"], size)
        start = time.perf_counter()
        loss = loss_of(tokens, targets)
        loss.backward()
        value = loss.item()
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        if value != value:
            sys.exit(f"compare_pytorch: the loss of step {step} is not a number, the figures would mean nothing")
        if step >= job["warmup"]:
            forward_backward.append(middle - start)
            update.append(end - middle)
    peak = peak_rss_mb()  # before the second sgemm allocates anything
    print(json.dumps({
        "forward_backward_ms": 1e3 * statistics.median(forward_backward),
        "optimizer_ms": 1e3 * statistics.median(update),
        "peak_rss_mb": peak,
        "import_rss_mb": rss_import,
        "sgemm_gflops": (sgemm_before + sgemm_gflops()) / 2,
        "adamw": adamw,
        "torch": torch.__version__,
    }))


# ---------------------------------------------------------------------------------------------------------------------
# The race. No torch from here on.


def model_gflop(shape):
    """Model FLOPs of one step in units of 1e9: 6 per parameter and token, and causal attention (half of T keys)."""
    L, C, V, T = shape["layers"], shape["channels"], shape["vocab"], shape["seq_len"]
    parameters = V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    return 1e-9 * (6 * parameters + 6 * L * C * T) * shape["batch_size"] * T


def pytorch_run(mode, shape, options, cache):
    """One PyTorch process. The environment decides threads and allocator before any library starts."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(options.threads), MKL_NUM_THREADS=str(options.threads),
                       TORCHINDUCTOR_CACHE_DIR=cache)
    if options.keep_pages:
        environment.update(MALLOC_MMAP_THRESHOLD_=str(1 << 40), MALLOC_TRIM_THRESHOLD_=str(1 << 40))
    job = {"mode": mode, "shape": shape, "threads": options.threads, "steps": options.steps,
           "warmup": options.warmup, "adamw": options.adamw}
    return json_line([options.python, os.path.abspath(__file__), "--child", json.dumps(job)], environment)


def command_run(template, shape, options):
    """THE PLACE WHERE OTHER PROGRAMS PLUG IN: runs a command given by --ours or --peer and reads its JSON line."""
    command = template
    for name, value in dict(shape, threads=options.threads, steps=options.steps).items():
        command = command.replace("{" + name + "}", str(value))
    return json_line(shlex.split(command), dict(os.environ, OMP_NUM_THREADS=str(options.threads)))


def json_line(command, environment):
    """The last line of a command's output that is a JSON object with the three figures."""
    before, start = foreign_cpu_seconds(), time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    foreign_cores = max(0.0, foreign_cpu_seconds() - before) / (time.perf_counter() - start)
    if done.returncode != 0:
        raise SystemExit(f"compare_pytorch: status {done.returncode} from: {shlex.join(command)}\n"
                         f"{done.stderr[-2000:]}")
    for line in reversed(done.stdout.splitlines()):
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(result, dict) and {"forward_backward_ms", "optimizer_ms", "peak_rss_mb"} <= result.keys():
            return dict(result, foreign_cores=foreign_cores)
    raise SystemExit(f"compare_pytorch: no JSON line with the three figures from: {shlex.join(command)}")


def foreign_cpu_seconds():
    """Processor time used so far by everything but this process and its finished children (0 where /proc is not)."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _iowait, *rest = (int(n) for n in file.readline().split()[1:9])
    except OSError:
        return 0.0
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def race(shape_name, shape, options, cache):
    """Every competitor once per round; returns {competitor: [result of each round]}."""
    runners = {}
    if options.ours:
        runners["ours"] = lambda: command_run(options.ours, shape, options)
    for mode in options.modes:
        runners[f"pytorch {mode}"] = lambda mode=mode: pytorch_run(mode, shape, options, cache)
    for peer in options.peer:
        name, _, template = peer.partition("=")
        runners[name] = lambda template=template: command_run(template, shape, options)
    results = {name: [] for name in runners}
    for r in range(options.rounds):
        for name in list(runners) if r % 2 == 0 else reversed(list(runners)):
            print(f"{shape_name}, round {r + 1} of {options.rounds}: {name} ...", file=sys.stderr, flush=True)
            results[name].append(runners[name]())
    return results


def summarize(shape_name, shape, results):
    """One record per competitor: medians over rounds, and the median of the ratios taken round by round."""
    tokens, gflop = shape["batch_size"] * shape["seq_len"], model_gflop(shape)
    median = lambda runs, key: statistics.median(run[key] for run in runs)
    records = []
    for name, runs in results.items():
        record = {"shape": shape_name, "competitor": name, "rounds": runs}
        for key in ("forward_backward_ms", "optimizer_ms", "peak_rss_mb", "foreign_cores"):
            record[key] = median(runs, key)
        step_ms = record["forward_backward_ms"] + record["optimizer_ms"]
        record["tokens_per_second"] = 1e3 * tokens / step_ms
        record["gflops"] = 1e3 * gflop / record["forward_backward_ms"]
        if all("sgemm_gflops" in run for run in runs):
            record["sgemm_gflops"] = median(runs, "sgemm_gflops")
            record["share_of_sgemm"] = statistics.median(
                1e3 * gflop / run["forward_backward_ms"] / run["sgemm_gflops"] for run in runs)
        if "ours" in results:
            pairs = list(zip(runs, results["ours"]))
            whole = lambda run: run["forward_backward_ms"] + run["optimizer_ms"]
            record["ours_faster"] = statistics.median(
                theirs["forward_backward_ms"] / ours["forward_backward_ms"] for theirs, ours in pairs)
            record["ours_faster_step"] = statistics.median(whole(theirs) / whole(ours) for theirs, ours in pairs)
            record["memory_over_ours"] = statistics.median(
                theirs["peak_rss_mb"] / ours["peak_rss_mb"] for theirs, ours in pairs)
        records.append(record)
    return records


def print_table(records):
    print(f"{'shape':20} {'competitor':16} {'fwd+bwd ms':>10} {'optim. ms':>9} {'tokens/s':>9} {'GFLOP/s':>8} "
          f"{'of sgemm':>8} {'RSS MB':>7} {'others':>6}   times ours: fwd+bwd  step  memory")
    for r in records:
        share = f"{100 * r['share_of_sgemm']:.0f} %" if "share_of_sgemm" in r else ""
        ratios = (f"{r['ours_faster']:21.2f} {r['ours_faster_step']:5.2f} {r['memory_over_ours']:7.2f}"
                  if "ours_faster" in r else "")
        print(f"{r['shape']:20} {r['competitor']:16} {r['forward_backward_ms']:10.1f} {r['optimizer_ms']:9.1f} "
              f"{r['tokens_per_second']:9.0f} {r['gflops']:8.1f} {share:>8} {r['peak_rss_mb']:7.0f} "
              f"{r['foreign_cores']:6.2f}   {ratios}")


def parse_shape(text):
    """'gpt2:4x64' to (text, the numbers)."""
    try:
        model, _, size = text.partition(":")
        batch_size, seq_len = (int(n) for n in size.split("x"))
        layers, channels, heads, vocab = MODELS[model]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' is not MODEL:BxT with MODEL one of {', '.join(MODELS)}")
    return text, dict(layers=layers, channels=channels, heads=heads, vocab=vocab, batch_size=batch_size,
                      seq_len=seq_len)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=parse_shape, action="append", metavar="MODEL:BxT",
                        help=f"repeatable; default {' '.join(ALL_SHAPES)}")
    for name in ("layers", "channels", "heads", "vocab", "batch-size", "seq-len"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="a shape of one's own: give all six of these")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    parser.add_argument("--modes", nargs="*", choices=("eager", "compile"), default=["eager", "compile"])
    parser.add_argument("--steps", type=int, default=7, help="timed steps in each process (default 7)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="processes per competitor and shape (default 3)")
    parser.add_argument("--adamw", choices=("auto", "fused", "foreach"), default="auto")
    parser.add_argument("--keep-pages", action="store_true",
                        help="glibc keeps PyTorch's freed memory (faster, larger)")
    parser.add_argument("--ours", metavar="COMMAND", help="our program; see above for what it must print")
    parser.add_argument("--peer", metavar="NAME=COMMAND", action="append", default=[],
                        help="any other program, repeatable")
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch (default: this one)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures, every round, to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    own = [options.layers, options.channels, options.heads, options.vocab, options.batch_size, options.seq_len]
    if any(own) and not all(own):
        parser.error("a shape of one's own needs --layers, --channels, --heads, --vocab, --batch-size and --seq-len")
    if any(own):
        keys = ("layers", "channels", "heads", "vocab", "batch_size", "seq_len")
        name = "L{}C{}H{}V{}:{}x{}".format(*own)
        options.shape = (options.shape or []) + [(name, dict(zip(keys, own)))]
    options.shape = options.shape or [parse_shape(text) for text in ALL_SHAPES]
    for name in ("threads", "steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main():
    options = parse_options()
    if options.child:
        return run_child(json.loads(options.child))
    records = []
    with tempfile.TemporaryDirectory(prefix="compare-pytorch-") as cache:  # compiled once per shape, not per round
        for name, shape in options.shape:
            records += summarize(name, shape, race(name, shape, options, cache))
    print_table(records)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(threads=options.threads, keep_pages=options.keep_pages, records=records), file, indent=1)
    else:
        print(json.dumps([{k: v for k, v in r.items() if k != "rounds"} for r in records]))


if __name__ == "__main__":
    main()
