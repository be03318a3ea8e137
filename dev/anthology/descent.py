"""Propositions 1 and 6: a step that promises a descent keeps its promise while the assumed sharpness is not too small.
Proposition 7: all layers move equally far."""
import math
import statistics

from page import number, picture, plot, table

# Steepest descent under the modular norm of the recipe `modular`, nothing smoothed: what the propositions speak of.
RULES = {"hidden": "spectral:ns=svd,scale=rms", "embedding": "colnorm:momentum=0", "position": "colnorm:momentum=0",
         "vector": "sign"}
WHAT = """Every step is the minimiser of the model that Proposition 1 makes of the loss, L + <G, dW> + (lambda/2)
||dW||^2, under the modular norm of the recipe `modular` without momentum (RMS->RMS for hidden matrices, l1->RMS for
embeddings, l1->linf for vectors), for a range of sharpnesses lambda (`--sharpness`). Were lambda at least the true
sharpness, the loss of the same batch would fall by at least ||G||^2 / (2 lambda) with the dual norm (for one layer
and square loss the paper proves which lambda is: Proposition 6). The telemetry (`--norms-every 1`) has the loss L'
and the gradient G' of the same batch after each step, so also the mean sharpness along the step, <G' - G, dW> /
||dW||^2. gpt2-nano, {steps} steps, a fresh batch for each."""


def main(lab, page, corpora):
    steps = 4 if lab.quick else 60
    powers = range(8, 18, 4 if lab.quick else 1)
    base = lab.base | corpora["bible"] | RULES | {"steps": steps, "schedule": "constant", "norms-every": 1}
    runs = lab.train([base | {"sharpness": 2.0**power} for power in powers], "descent")
    refused = next((run.failed for run in runs if run.failed.startswith("refused")), None)
    if refused:
        lab.skip("descent", refused)
        return
    rows, summary, ratios, lines = [], [], [], []
    for power, run in zip(powers, runs):
        norms = [finite(line) for line in run.lines("norms")]
        if not norms:
            continue
        assumed = 2.0**power
        fell = share(line["loss_after"] < line["loss"] for line in norms)
        kept = share(line["loss_after"] <= promise(line, assumed) for line in norms)
        smaller = share(line["sharpness"] <= assumed for line in norms)
        measured = statistics.median(line["sharpness"] for line in norms)
        step = statistics.median(line["length"] for line in norms)
        ratios += [ratio for line in norms if (ratio := layer_ratio(line)) is not None]
        rows.append([f"2^{power}", number(step), f"{fell:.0%}", f"{kept:.0%}", number(measured), f"{smaller:.0%}",
                     number(run.loss, 4)])
        summary.append({"assumed": assumed, "fell": fell, "guaranteed": kept, "measured": measured, "loss": run.loss})
        if power % 2 == (0 if lab.quick else 1):
            points = [(line["step"], line["sharpness"]) for line in norms if 0 < line["sharpness"] < math.inf]
            if points:
                x, y = zip(*points)
                color = ["#0060ad", "#dd181f", "#2ca02c", "#ff7f0e", "#9467bd"][len(lines) // 2 % 5]
                lines.append({"x": x, "y": y, "title": f"measured, 2^{power} assumed", "color": color})
                lines.append({"x": [0, steps], "y": [assumed, assumed], "with": "lines dt 2", "color": color})
    plot(page.folder / "sharpness.png", lines,
         "set logscale y\nset yrange [100:2e5]\nset format y '1e%L'\nset xlabel 'step'\nset ylabel 'sharpness'\n"
         "set key outside right")
    head = ["lambda assumed", "median step ‖dW‖", "loss falls", "falls as guaranteed", "median lambda measured",
            "measured ≤ assumed", "final validation loss"]
    equal = (f"Proposition 7: over all these {len(ratios)} steps the largest s ‖dW‖ of a tensor (those without gradient left "
             f"out) is at most {max(ratios):.6f} times the smallest, median {statistics.median(ratios):.6f}."
             if ratios else "")
    page.section("descent", "Guaranteed descent, and equal steps of all layers", WHAT.format(steps=steps),
                 [table(head, rows), picture("sharpness, step by step (dashed: assumed)", "sharpness.png"), equal],
                 {"sharpness": summary, "largest_ratio": max(ratios, default=None)}, runs)


def finite(line):
    """A step that diverged has no numbers: its losses and sharpness count as infinite."""
    return {name: math.inf if value is None else value for name, value in line.items()}


def promise(line, assumed):
    """The loss that Proposition 1's model promises at most, if its sharpness is large enough: L - ||G||^2 / (2 lambda)."""
    quadratic = 0.5 * assumed * line["length"] ** 2
    return line["loss"] + line["predicted"] + quadratic if math.isfinite(line["loss_after"]) else -math.inf


def share(truths):
    truths = list(truths)
    return sum(truths) / len(truths)


def layer_ratio(line):
    """max / min over tensors of s ||dW||."""
    steps = [tensor["s_step"] for tensor in line["tensors"].values() if tensor["s_step"]]
    return max(steps) / min(steps) if steps else None
