"""Does the best step size stay where it is when the model grows?"""
import math

from page import number, panels, picture, table, with_error
from runs import mean_and_error
from tuning import best, try_octaves, valley, with_seed

# What the multiplier m multiplies: the step sizes of all roles at once, their ratios kept.
RECIPES = {
    "adam": lambda m: {role: f"adam:lr={0.004 * m:.6g}" for role in ("hidden", "embedding", "position", "vector")},
    "sign": lambda m: {role: f"sign:lr={0.001 * m:.6g}" for role in ("hidden", "embedding", "position", "vector")},
    "muon (Keller), adam": lambda m: {"hidden": f"muon:lr={0.02 * m:.6g}"} | small("adam", 0.003 * m),
    "muon (RMS), adam": lambda m: {"hidden": f"muon:scale=rms,lr={0.02 * m:.6g}"} | small("adam", 0.003 * m),
    "modular": lambda m: modular(m),
    "modular, masses": lambda m: modular(8 * m) | {"sensitivity": "masses"},
}
WHAT = """The loss after {steps} steps of 8 x 64 bytes of the King James Bible against the step size, for widths (2
layers, 16 channels a head) and depths (64 channels). m multiplies the step sizes of all roles. Six of them a factor 2
apart, and up to two more where the best would lie at the edge; around the best of them three, and again up to two more,
with each of {more} other seeds. The best of a seed is the lowest point of a parabola through its best three; the tables
have means and standard errors over the seeds, of shifts within each seed. `modular, masses` also divides the steps by
sensitivities from masses (`--sensitivity masses`) and starts at 8 times the steps, which are then of about the same
size."""


def small(rule, lr):
    return {role: f"{rule}:lr={lr:.6g}" for role in ("embedding", "position", "vector")}


def modular(m):
    return {"hidden": f"muon:momentum=0.95,scale=rms,lr={0.02 * m:.6g}", "vector": f"signum:beta=0.9,lr={0.002 * m:.6g}"} | {
        role: f"colnorm:momentum=0.9,lr={0.02 * m:.6g}" for role in ("embedding", "position")}


def main(lab, page, corpora):
    steps, octaves, more = (3, range(-1, 2), 0) if lab.quick else (120, range(-3, 3), 2)
    widths = [(2, width) for width in ((32, 64) if lab.quick else (32, 64, 128))]
    depths = [(depth, 64) for depth in ((2, 4) if lab.quick else (2, 4, 8))]
    base = lab.base | corpora["bible"] | {"steps": steps, "batch-size": lab.base["batch-size"] // 2,
                                          "schedule": "wsd:cooldown=0.6"}
    cases = {(name, size): (options(base, recipe, size), 1) for name, recipe in RECIPES.items()
             for size in sorted(set(widths + depths))}
    found = sweep(lab, cases, octaves)
    others = other_seeds(lab, cases, found, more)
    names = [name for name in RECIPES if all((name, size) in found for size in widths + depths)]
    parts, summary = [], {}
    for what, sizes, values in (("width", widths, [w for _, w in widths]), ("depth", depths, [d for d, _ in depths])):
        rows = []
        for name in names:
            tried = [found[name, size] for size in sizes]
            seeds = [[each] + others[name, size] for each, size in zip(tried, sizes)]  # of each size
            lows = [[valley(one) for one in each] for each in seeds]
            edge = ["*" if any(best(one) in (min(one), max(one)) for one in each) else "" for each in seeds]
            best_at = [mean_and_error(low) for low in lows]
            shift, shift_error = mean_and_error([last - first for first, last in zip(lows[0], lows[-1])])
            loss = [mean_and_error([min(run.loss for run in one.values()) for one in each]) for each in seeds]
            rows.append([name] + [with_error(*at, digits=1) + star for at, star in zip(best_at, edge)] +
                        [("+" if shift >= 0 else "") + with_error(shift, shift_error, digits=1),
                         number(price(tried[0], tried[-1]), 2)] + [with_error(*each) for each in loss])
            summary[f"{what}, {name}"] = {"best": lows, "shift": [shift, shift_error], "loss": [mean for mean, _ in loss]}
        head = ([what] + [f"best at {x}" for x in values] + ["shift, octaves", "price of keeping"] +
                [f"loss at {x}" for x in values])
        parts.append(table(head, rows))
        grid = [(name, curves([found[name, size] for size in sizes], [f"{what} {x}" for x in values])) for name in names]
        panels(page.folder / f"transfer-{what}.png", grid, columns=3,
               settings="set xlabel 'log2 of the multiplier'\nset ylabel 'validation loss'\nset key top center")
        parts.append(picture(f"loss against step size, by {what}", f"transfer-{what}.png"))
    note = ("The best step sizes as log2 of m. Price of keeping: how much higher the loss of the largest model is with the best "
            "step size of the smallest than with its own (nearest of those tried, first seed; the pictures are of that seed, too).")
    page.section("transfer", "Does the step size transfer?", WHAT.format(steps=steps, more=more), [note] + parts, summary,
                 [run for tried in [*found.values(), *(one for each in others.values() for one in each)]
                  for run in tried.values()])


def options(base, recipe, size):
    layers, channels = size
    model = {"model": f"gpt2-nano:layers={layers},channels={channels},heads={channels // 16}"}
    return lambda m: base | model | recipe(m)


def sweep(lab, cases, octaves):
    """{case: {octave: Result}}; extended where the best is at the edge."""
    found = {case: {} for case in cases}
    try_octaves(lab, cases, found, {case: octaves for case in cases}, "transfer")
    for case in [case for case in cases if any(run.failed.startswith("refused") for run in found[case].values())]:
        lab.skip(f"transfer, {case[0]}", next(run.failed for run in found[case].values() if run.failed))
        found.pop(case)
    extend(lab, cases, found, "transfer, beyond the edge")
    return found


def extend(lab, cases, found, what):
    """One step size more where the best is at the edge, twice."""
    for _ in range(0 if lab.quick else 2):
        beyond = {}
        for case, tried in found.items():
            edges = {min(tried): min(tried) - 1, max(tried): max(tried) + 1}
            beyond[case] = [edges[best(tried)]] if best(tried) in edges else []
        try_octaves(lab, cases, found, beyond, what)


def other_seeds(lab, cases, found, count):
    """{case: [{octave: Result} of each other seed]}: around the first seed's best."""
    seeded = {(case, seed): (with_seed(cases[case][0], seed), 1) for case in found for seed in range(11, 11 + count)}
    tried = {key: {} for key in seeded}
    around = {(case, seed): range(best(found[case]) - 1, best(found[case]) + 2) for case, seed in seeded}
    try_octaves(lab, seeded, tried, around, "transfer, other seeds")
    extend(lab, seeded, tried, "transfer, other seeds, beyond the edge")
    return {case: [tried[case, seed] for seed in range(11, 11 + count)] for case in found}


def price(small_model, large):
    """Loss of the large model at the small one's best step size, above its own best."""
    wanted = best(small_model)
    nearest = min(large, key=lambda octave: abs(octave - wanted))
    return large[nearest].loss - min(run.loss for run in large.values())


def curves(tried, titles):
    """One line for each size; far above the valleys nothing is drawn."""
    top = max(min(run.loss for run in each.values()) for each in tried) + 0.6
    lines = []
    for each, title in zip(tried, titles):
        octaves = [octave for octave in sorted(each) if each[octave].loss < top]
        lines.append({"x": octaves, "y": [each[octave].loss for octave in octaves], "title": title,
                      "with": "linespoints lw 2 pt 7 ps 0.7"})
    return lines
