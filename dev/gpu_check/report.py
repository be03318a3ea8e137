#!/usr/bin/env python3
"""Turns the record of dev/gpu_check/run.py into gpu-NAME-DATE.md and .json. A figure was measured, or it is absent.

  report.py RECORD.json OUT    writes both files again, from the JSON of an earlier run
"""
import json
import os
import re
import sys


def table(header, rows):
    """Markdown; every column but the first is right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def number(value, digits=1):
    """Absent is a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def figures_of(record, stage):
    return record["stages"].get(stage, {}).get("figures")


def stages_section(record):
    rows = []
    for name, outcome in record["stages"].items():
        note = outcome.get("why", "")
        figures = outcome.get("figures") or {}
        if "tests" in figures and not note:
            note = f"{figures['tests']} tests" + (f", {figures['skipped']} skipped" if figures["skipped"] else "")
        if "results" in figures:
            wrong = sum("failure" in row for row in figures["results"])
            note = f"{len(figures['results']) - wrong} right" + (f", {wrong} WRONG" if wrong else "")
        if name == "parity" and figures:
            note = (f"largest difference {figures['largest_difference_fp32']:.5f} fp32, "
                    f"{figures['largest_difference_bf16']:.5f} bf16")
        if name == "ranks" and "bf16" in figures:
            note = f"losses of 2 and 3 ranks differ by {figures['fp32']['far']:.1e} fp32, {figures['bf16']['far']:.1e} bf16"
        rows.append([name, outcome["status"], number(outcome["seconds"]), note.replace("|", "/").replace("\n", " ")])
    return table(["stage", "result", "seconds", "note"], rows)


def failures_section(record):
    rows = []
    for stage in record["stages"]:
        for name, words in (figures_of(record, stage) or {}).get("said", {}).items():
            rows.append([f"`{name}`", stage, words.replace("|", "/").replace("\n", " ")])
    return "## Tests that failed\n\n" + table(["test", "stage", "what it said"], rows) if rows else ""


def machine_section(record):
    figures = figures_of(record, "machine")
    return ", ".join(f"{key} {value}" for key, value in figures.items()) if figures else "unknown"


def step_rows(record):
    bench, train, peer = (figures_of(record, stage) for stage in ("phases", "train", "pytorch"))
    if bench:
        yield ["ours, dev/bench, " + bench["recipe"], bench["step_ms"], bench["tokens_per_second"],
               bench["optimizer_ms"], bench.get("peak_device_mb")]
    for recipe, run in (train or {}).get("recipes", {}).items():
        yield [f"ours, train_gpt, {recipe} recipe", run["step_ms"], run["tokens_per_second"], None, None]
    for name in ("adamw", "muon"):
        run = (peer or {}).get(name)
        if run and "step_ms" in run:
            yield [f"PyTorch {peer['torch']}, {'compiled' if peer['compiled'] else 'eager'}, {name}", run["step_ms"],
                   run["tokens_per_second"], run["optimizer_ms"], run.get("peak_memory_mib")]


def step_section(record):
    rows = [[name, number(ms, 2), number(speed, 0), number(optimizer, 2), number(memory, 0)]
            for name, ms, speed, optimizer, memory in step_rows(record)]
    if not rows:
        return ""
    train, peer, bench = (figures_of(record, stage) for stage in ("train", "pytorch", "phases"))
    sizes = train or peer or bench
    text = f"## A training step, {sizes['batch_size']} x {sizes['seq_len']} tokens, bf16\n\n" + table(
        ["", "ms", "tokens/s", "optimizer ms", "peak MiB"], rows)
    for recipe, run in (train or {}).get("recipes", {}).items():
        text += (f"\n\ntrain_gpt, {recipe} recipe: {number(run['launch_to_first_step_seconds'], 2)} s from launch to the "
                 f"end of the first step, which took {run['first_step_ms']:.0f} ms; {run['whole_run_seconds']:.1f} s to the exit, with "
                 f"the checkpoint; loss {run['first_loss']:.4f} to {run['last_loss']:.4f}.")
    for name in ("adamw", "muon"):
        run = (peer or {}).get(name, {})
        if "first_step_seconds" in run:
            text += f"\n\nPyTorch's first {name} step, compilation included: {run['first_step_seconds']:.1f} s."
        elif "missing" in run:
            text += f"\n\nNo PyTorch {name}: {run['missing']}."
    return text


def phases_section(record):
    bench = figures_of(record, "phases")
    if not bench:
        return ""
    total = sum(row["seconds"] for row in bench["phases"])
    rows = []
    for row in bench["phases"]:
        rows.append([row["phase"], row["op"], row["calls"], number(1e3 * row["seconds"], 2),
                     number(100 * row["seconds"] / total),
                     number(row["flops"] / row["seconds"] / 1e12) if row["flops"] else "-",
                     number(row["bytes"] / row["seconds"] / 1e9, 0) if row["bytes"] else "-"])
    return ("## Where the time goes\n\nEvery operation waited for, so the sum is longer than a step. The step reaches "
            f"{100 * bench['share_of_floor']:.0f} % of the floor of its matrix products, "
            f"{100 * bench['speed_of_light']:.0f} % with memory traffic counted. The host needs {number(bench.get('enqueue_ms'), 2)} ms "
            "to capture, update and launch a step's graph.\n\n" +
            table(["phase", "operation", "calls", "ms", "%", "TFLOP/s", "GB/s"], rows))


def harness_section(record, stage, title):
    figures = figures_of(record, stage)
    if not figures:
        return ""
    rows = []
    for row in figures["results"]:
        start = [f"`{row['case']}`", row["variant"], row["checked_by"]]
        if "failure" in row:
            rows.append(start + ["FAILED: " + row["failure"].replace("|", "/"), "", "", "", ""])
            continue
        seconds = row["median_ms"] / 1e3
        rate = (f"{row['flops'] / seconds / 1e12:,.1f} TFLOP/s" if row["limit"] == "flops"
                else f"{row['bytes'] / seconds / 1e9:,.0f} GB/s")
        rows.append(start + [number(row["median_ms"], 4), number(row["min_ms"], 4), number(row["max_ms"], 4), rate,
                             f"{100 * row['share_of_roofline']:.0f} %"])
    return (f"## {title}\n\nRooflines of this run: copy {figures['copy_bytes_per_second'] / 1e9:,.0f} GB/s, product "
            f"{figures['product_flops_per_second'] / 1e12:,.1f} TFLOP/s ({figures['dtype']}). Cold L2.\n\n" +
            table(["case", "variant", "checked by", "median ms", "min", "max", "rate", "of roofline"], rows))


def parity_section(record):
    figures = figures_of(record, "parity")
    if not figures:
        return ""
    curves = figures["curves"]
    steps = len(next(iter(curves.values())))
    shown = sorted({0, *[s for s in (1, 2, 5, 10, 20, 50, 100, 200) if s < steps], steps - 1})
    return ("## The same losses on both devices\n\n" +
            table(["step", *curves], [[s, *[f"{curve[s]:.5f}" for curve in curves.values()]] for s in shown]))


def name_of(record):
    if record["self_test"]:
        return "self-test"
    machine = figures_of(record, "machine") or {}
    return re.sub(r"[^a-z0-9]+", "-", machine.get("name", "unknown").lower().replace("nvidia", "")).strip("-")


def markdown(record):
    name = (figures_of(record, "machine") or {}).get("name", "the executor" if record["self_test"] else "unknown GPU")
    parts = [f"# GPU check: {name}, {record['date']}", machine_section(record),
             f"`make gpu-check`, {record['seconds']:.0f} seconds in all.", stages_section(record), failures_section(record),
             step_section(record),
             phases_section(record), harness_section(record, "gemm", "Matrix products of GPT-2 124M"),
             harness_section(record, "gemm_lab", "Candidates for matrix products"),
             harness_section(record, "ops_bf16", "Operations, bf16"),
             harness_section(record, "ops_fp32", "Operations, fp32"), parity_section(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(record, folder):
    """Writes both files and returns their paths."""
    stem = os.path.join(folder, f"gpu-{name_of(record)}-{record['date']}")
    with open(stem + ".md", "w") as file:
        file.write(markdown(record))
    with open(stem + ".json", "w") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    return [stem + ".md", stem + ".json"]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1]) as source:
        print("\n".join(write(json.load(source), sys.argv[2])))
