#!/usr/bin/env python3
"""The same training step in PyTorch: what our step is compared with, in the same run on the same GPU.

GPT-2 as published (Radford et al. 2019; tanh GELU, learned positions, tied head), the whole of loss and gradients
under torch.compile, matrix products in bf16 by autocast, attention by PyTorch's flash kernel, the vocabulary padded
to a multiple of 128. Two optimizers, one after the other on one model: AdamW (fused), and torch.optim.Muon for the
matrices of the layers with AdamW for the rest. Random tokens. Prints one line of JSON: medians over the timed steps.

  pytorch_peer.py                                                    # 124M, 64 x 1024 tokens
  pytorch_peer.py --device cpu --layers 2 --channels 64 --heads 2 --vocab 256 --batch-size 2 --seq-len 32 --no-compile
"""
import argparse
import contextlib
import json
import math
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.fc, self.fcproj = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        B, T, C = x.shape
        heads = self.qkv(self.ln1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, NH, T, HS) each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self, layers, channels, heads, vocab, positions):
        super().__init__()
        self.vocab = vocab
        self.wte = nn.Embedding((vocab + 127) // 128 * 128, channels)
        self.wpe = nn.Embedding(positions, channels)
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(layers))
        self.lnf = nn.LayerNorm(channels)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * layers) if "proj" in name else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.lnf(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Both:
    """Two optimizers that step as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def adamw(parameters, device):
    return torch.optim.AdamW(parameters, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda")


def make_optimizer(name, model, device):
    if name == "adamw":
        return adamw(model.parameters(), device)
    hidden = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return Both(torch.optim.Muon(hidden, lr=0.02, momentum=0.95, nesterov=True, ns_steps=5), adamw(rest, device))


class Timer:
    """Marks on the device's own clock; the differences are read after everything has run."""

    def __init__(self, device):
        self.cuda = device == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, a, b):
        if not self.cuda:
            return 1e3 * (b - a)
        torch.cuda.synchronize()
        return a.elapsed_time(b)


def train(name, model, loss_of, batches, o):
    optimizer = make_optimizer(name, model, o.device)
    timer, marks, losses = Timer(o.device), [], []
    start = time.perf_counter()
    for step in range(o.warmup + o.steps):
        tokens, targets = batches[step % len(batches)]
        begin = timer.mark()
        with torch.autocast(o.device, dtype=torch.bfloat16, enabled=not o.fp32):
            loss = loss_of(tokens, targets)
        loss.backward()
        middle = timer.mark()
        optimizer.step()
        end = timer.mark()
        for p in model.parameters():
            p.grad = None
        losses.append(loss.detach())
        marks.append((begin, middle, end))
        if step == 0:
            first_loss = loss.item()  # waits
            first_step_s = time.perf_counter() - start
    median = lambda pairs: statistics.median(timer.milliseconds(a, b) for a, b in pairs)
    timed = marks[o.warmup:]
    step_ms = timer.milliseconds(timed[0][0], timed[-1][2]) / len(timed)
    return {"first_step_seconds": first_step_s, "step_ms": step_ms,
            "forward_backward_ms": median([(a, b) for a, b, _ in timed]),
            "optimizer_ms": median([(b, c) for _, b, c in timed]),
            "tokens_per_second": 1e3 * o.batch_size * o.seq_len / step_ms,
            "first_loss": first_loss, "last_loss": losses[-1].item()}


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("channels", 768), ("heads", 12), ("vocab", 50257), ("batch-size", 64),
                          ("seq-len", 1024), ("steps", 15), ("warmup", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), action="append")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--fp32", action="store_true", help="no autocast")
    return parser.parse_args()


def main():
    o = parse_options()
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    model = Gpt2(o.layers, o.channels, o.heads, o.vocab, o.seq_len).to(o.device)
    loss_of = model if o.no_compile else torch.compile(model)
    shape = (o.batch_size, o.seq_len + 1)
    ids = [torch.randint(o.vocab, shape, device=o.device) for _ in range(4)]
    batches = [(i[:, :-1].contiguous(), i[:, 1:].contiguous()) for i in ids]
    flash = contextlib.nullcontext()
    if o.device == "cuda":
        from torch.nn.attention import SDPBackend, sdpa_kernel
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    result = {"torch": torch.__version__, "compiled": not o.no_compile, "fp32": o.fp32,
              "parameters": sum(p.numel() for p in model.parameters()), "batch_size": o.batch_size,
              "seq_len": o.seq_len}
    with flash:
        for name in o.optimizer or ["adamw", "muon"]:
            if name == "muon" and not hasattr(torch.optim, "Muon"):
                result[name] = {"missing": f"torch {torch.__version__} has no torch.optim.Muon"}
                continue
            if o.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            result[name] = train(name, model, loss_of, batches, o)
            if o.device == "cuda":
                result[name]["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
            print(json.dumps(result), flush=True)  # the last line is whole, also when what follows is stopped


if __name__ == "__main__":
    sys.exit(main())
