"""The escape velocity: its growth law, its bound, and what it is worth against a tuned step size."""
import math

import norms
from page import number, picture, plot, table, with_error
from runs import START, mean_and_error

ETA0 = 1e-8
GOLDEN = (1 + math.sqrt(5)) / 2


def linf(_name, _shape):
    return norms.largest_entry


def spectral_and_sign(name, shape):
    return norms.spectral_blocks if is_hidden(name, shape) else norms.largest_entry


def modular(name, shape):
    if is_hidden(name, shape):
        return norms.rms_to_rms
    return norms.largest_row_rms if len(shape) == 2 else norms.largest_entry


def is_hidden(name, shape):
    return len(shape) == 2 and ".h." in "." + name


# name -> rules (of hidden, embedding, position, vector), and the norm of each tensor
NORMS = {
    "sign (Prodigy without averages)": (("sign", "sign", "sign", "sign"), linf),
    "spectral, sign elsewhere": (("spectral:ns=svd", "sign", "sign", "sign"), spectral_and_sign),
    "modular": (("spectral:ns=svd,scale=rms", "colnorm:momentum=0", "colnorm:momentum=0", "sign"), modular),
}
WHAT = """Steps begin at eta0 = 1e-8 and grow to the escape velocity (`--escape 1e-8`), under three norms. While the
loss is linear in the way travelled, eta must grow by the golden ratio, 1.618 a step (Fibonacci, not the doubling of
the paper's text); that is seen with the same batch at every step, with fresh batches gradients turn and growth is
slower. eta may never pass the longest way travelled so far, max_l ||W_l - W0_l||_l, here measured from the checkpoint
of every {every}th of the first {early} steps. Then {steps} steps on fresh batches, against the same rules with one
constant step size for all tensors, the best of {count} (a factor 2 apart, one seed), both over {seeds} seeds with the
schedule of the recipes (wsd, last 60 % decay)."""


def rules_of(name):
    return dict(zip(("hidden", "embedding", "position", "vector"), NORMS[name][0]))


def main(lab, page, corpora):
    early, every, steps = (8, 4, 6) if lab.quick else (48, 4, 400)
    seeds, powers = (1, (-9, -7)) if lab.quick else (3, range(-12, -3))
    growth, lines, results = grow(lab, corpora, early, every)
    plot(page.folder / "prodigy-eta.png", lines,
         "set logscale y\nset xlabel 'step'\nset ylabel 'eta'\nset key bottom right\nset format y '1e%L'")
    races, more = against_constant(lab, corpora, steps, seeds, powers)
    head = ["norm", "batches", "growth a step, median of the linear phase", "eta at the end",
            "largest eta / way travelled before", "checked at"]
    race_head = ["norm", "with escape velocity", "eta at the end", "best constant step size", "that step size"]
    parts = [table(head, growth), picture("eta over the first steps", "prodigy-eta.png"), table(race_head, races)]
    page.section("prodigy", "Prodigy's growth law and its bound",
                 WHAT.format(every=every, early=early, steps=steps, count=len(list(powers)), seeds=seeds), parts,
                 {"growth": growth, "race": races}, results + more)


def grow(lab, corpora, early, every):
    """Rows and curves of the first steps: the same batch, and fresh ones."""
    cases = [(name, data) for data in ("one batch", "bible") for name in NORMS]
    base = lab.base | {"steps": early, "schedule": "constant", "escape": ETA0, "checkpoint-every": every,
                   "keep": 0}
    runs = lab.train([base | corpora[data] | rules_of(name) for name, data in cases], "prodigy: growth")
    begins = lab.train([lab.base | corpora[data] | START for data in ("one batch", "bible")], "prodigy: the start")
    rows, lines = [], []
    for (name, data), run in zip(cases, runs):
        if run.failed:
            lab.skip(f"prodigy, {name}", run.failed)
            continue
        steps, eta = run.curve("train", "lr")
        linear = [b / a for a, b in zip(eta, eta[1:]) if 10 * ETA0 < a and b < 1e4 * ETA0]
        begin = begins[0 if data == "one batch" else 1].initial_weights()
        worst = checked = longest = 0.0
        for step in range(every, early, every):
            # eta after the gradient at W_step is what the next step is made with; ways between the checkpoints do not
            # count, which only makes the test harder.
            longest = max(longest, norms.distance(run.weights(step), begin, NORMS[name][1]))
            worst, checked = max(worst, eta[step + 1] / longest), checked + 1
        law = number(sorted(linear)[len(linear) // 2], 5) if linear else "-"
        rows.append([name, "the same" if data == "one batch" else "fresh", law, number(eta[-1]), f"{worst:.4f}",
                     f"{checked:.0f} steps"])
        dash = "lines lw 2" if data == "one batch" else "lines lw 2 dt 2"
        lines.append({"x": steps, "y": eta, "title": f"{name}, {'one batch' if data == 'one batch' else 'fresh batches'}",
                      "with": dash, "color": ["#0060ad", "#dd181f", "#2ca02c"][list(NORMS).index(name)]})
    law = range(0, min(early, 28))
    lines.append({"x": list(law), "y": [ETA0 * GOLDEN ** max(0, step - 2) for step in law], "title": "golden ratio",
                  "with": "lines dt 3 lw 2", "color": "#555555"})
    return rows, lines, runs


def against_constant(lab, corpora, steps, seeds, powers):
    """Rows: the final loss with the escape velocity and with the best constant step size."""
    base = lab.base | corpora["bible"] | {"steps": steps, "schedule": "wsd:cooldown=0.6"}
    rows, results = [], []
    for name in NORMS:
        escaping = lab.train([base | rules_of(name) | {"escape": ETA0, "seed": 11 + seed} for seed in range(seeds)],
                             f"prodigy: {name}")
        tried = lab.train([base | constant(name, 2.0**power) for power in powers], f"prodigy: {name}, constant")
        best = min(zip(powers, tried), key=lambda pair: pair[1].loss)[0]
        tuned = lab.train([base | constant(name, 2.0**best) | {"seed": 11 + seed} for seed in range(seeds)],
                          f"prodigy: {name}, best constant")
        results += escaping + tried + tuned
        etas = [run.curve("train", "eta")[1][-1] if "eta" in (run.lines("train") or [{}])[-1]
                else max(run.curve("train", "lr")[1], default=math.nan) for run in escaping]
        edge = "*" if best in (powers[0], powers[-1]) else ""
        rows.append([name, with_error(*mean_and_error([run.loss for run in escaping])), number(mean_and_error(etas)[0]),
                     with_error(*mean_and_error([run.loss for run in tuned])), f"2^{best}{edge}"])
    return rows, results


def constant(name, lr):
    return {role: rule + ("," if ":" in rule else ":") + f"lr={lr}" for role, rule in rules_of(name).items()}
