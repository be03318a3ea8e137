"""Two ranks of this machine: traffic against the formula, and how much of the exchanges hides behind computing.

  python3 dev/bench_ranks.py PROGRAM [--ranks 2] [--model gpt2-small] [--steps 8]

Trains on random tokens with one process and with --ranks, one thread for each rank, the same global batch. Prints medians over
the steps after the first three, of rank 0: `sent` is measured by the communicator, `formula` is (N-1)/N of the gradients and of
the weights for its own pieces (optim/exchange.h); the small sums of a step are the difference.
"""
import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import tempfile


def random_shard(path, tokens, vocab):
    """A token shard (256 int32 of header, then uint16 ids)."""
    state, ids = 1, []
    for _ in range(tokens):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocab)
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", 20240520, 1, tokens, *[0] * 253) + struct.pack(f"<{tokens}H", *ids))


def train(o, folder, shard, ranks):
    out = os.path.join(folder, f"out{ranks}")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    launcher = ["mpirun", "-q", *root, "--oversubscribe", "--bind-to", "none", "-np", str(ranks)] if ranks > 1 else []
    subprocess.run([*launcher, o.program, "train", "--device", "cpu", "--threads", "1", "--train", shard, "--val", shard, "--out", out,
                    "--model", o.model, "--batch-size", str(o.global_batch // o.ranks), "--global-batch", str(o.global_batch),
                    "--seq-len", str(o.seq_len), "--steps", str(o.steps + 3), "--val-every", "0", "--val-tokens", str(o.seq_len)],
                   check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(out, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", default="gpt2-small")
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    o = parser.parse_args()
    if not shutil.which("mpirun"):
        print("several ranks: no mpirun, not measured; apt-get install libopenmpi-dev openmpi-bin, and build again")
        return
    with tempfile.TemporaryDirectory() as folder:
        shard = os.path.join(folder, "tokens.bin")
        random_shard(shard, o.global_batch * o.seq_len * 2 + 1, 257)
        logs = {ranks: train(o, folder, shard, ranks) for ranks in (1, o.ranks)}
    mean = lambda lines, key: statistics.median(line[key] for line in lines[3:])
    one, many = ([line for line in logs[n] if line["type"] == "train"] for n in (1, o.ranks))
    busy, exposed = mean(many, "comm_busy_ms"), mean(many, "comm_exposed_ms")
    print(f"{o.ranks} ranks of one thread, {o.model}, {o.global_batch} x {o.seq_len} tokens a step; one process of one thread takes "
          f"{mean(one, 'step_ms'):.0f} ms")
    print(f"  step      {mean(many, 'step_ms'):.0f} ms, {mean(one, 'step_ms') / mean(many, 'step_ms'):.2f} times as fast")
    print(f"  traffic   {mean(many, 'comm_bytes') / 1e6:.3f} MB sent by rank 0, formula {logs[o.ranks][0]['comm_bytes_formula'] / 1e6:.3f} MB")
    print(f"  exchanges {busy:.1f} ms under way, {exposed:.1f} ms of them waited for: {100 * (1 - exposed / busy):.0f} % hidden")


if __name__ == "__main__":
    main()
