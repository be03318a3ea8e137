"""The speedrun's 25 ms on paper: what sharding Newton-Schulz over 8 GPUs should have saved, from other published figures.

Records 5 and 6 of modded-nanogpt (reference/speedrun.md section 1) differ in one thing: every GPU orthogonalised all 72
matrices, one after the other; then matrix i only on rank i mod 8, and a bf16 buffer of all updates was all-reduced.

  saved = X - X / 8 - all-reduce,    X: seconds of Newton-Schulz for all matrices on one GPU, unbatched

python3 dev/plan/speedrun.py prints each step; the page dev/many_gpus.md explains them.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import formulas as f  # noqa: E402
from machine import Machine  # noqa: E402

N = 8
MEASURED = 178.9e-3 - 153.8e-3  # record 5 less record 6
# reference/gpu_kernels.md section 2.3: a product of 1024^3 by cuBLAS on an H800, 64 tiles of 128 x 128 at once on 132 SMs.
PRODUCT_1024 = 0.0112e-3
TILE, SMS = 128, 132
# reference/speedrun.md section 3, 2024-10-29: record 7 with Muon and with Adam.
MUON_LESS_ADAM = 142.0e-3 - 138.6e-3


def product_seconds(rows, cols, depth):
    """As many rounds of tiles as it takes, each as long as it is deep."""
    rounds = -(-(-(-rows // TILE) * -(-cols // TILE)) // SMS)
    return PRODUCT_1024 * depth / 1024 * rounds


def unbatched_seconds(n, m, steps=f.NEWTON_SCHULZ_STEPS):
    """A = X X^T, B = A X, X = a X + b B + c A B, the order before record 11: the products alone, no launches."""
    return steps * (product_seconds(n, n, m) + 2 * product_seconds(n, m, n))


def saved(X, all_reduce):
    return X - X / N - all_reduce


def estimates(machine, model=f.MODELS["gpt2"]):
    """{name: seconds}: everything on the way, and what two independent estimates say was saved."""
    H, memory = f.size_of(model, "hidden"), machine.number("memory")
    all_reduce = f.all_reduce_bytes(2 * H, N) / machine.number("inside_bandwidth")
    products = model.L * (4 * unbatched_seconds(model.C, model.C) + 2 * unbatched_seconds(model.C, 4 * model.C))
    # Muon less Adam = X/8 + all-reduce + momentum on an eighth (16 bytes a number) + applying updates everywhere (10 bytes)
    # - Adam on the hidden matrices (28 bytes)
    elementwise = H * (16 / N + 10 - 28) / memory
    runs = N * (MUON_LESS_ADAM - all_reduce - elementwise)
    return {"all-reduce of updates": all_reduce, "X, products alone": products, "saved, by products alone": saved(products, all_reduce),
            "X, from Muon less Adam": runs, "saved, by Muon less Adam": saved(runs, all_reduce), "saved, measured": MEASURED,
            "X, from what was saved": (MEASURED + all_reduce) * N / (N - 1),
            "ours, batched, on one GPU": machine.newton_schulz_seconds(
                model.L * (4 * f.newton_schulz_flops(model.C, model.C) + 2 * f.newton_schulz_flops(model.C, 4 * model.C)),
                "bf16", 1)}


if __name__ == "__main__":
    for name, seconds in estimates(Machine.read(os.path.join(HERE, "machines", "h100.json"))).items():
        print(f"{name:<28} {seconds * 1e3:6.2f} ms")
