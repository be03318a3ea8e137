"""A race of rules on real text, each tuned by the same budget; and which norm for embeddings and vectors."""
import math
import statistics

from page import number, picture, plot, table, with_error
from runs import mean_and_error
from tuning import SEEDS, TRIED, tune

ADAM = "adam:lr=0.003"
UNTIED = {"model": "gpt2-nano:tied=0"}
# The rules of hidden matrices, and a first guess of lr; what is not said is the rule's default.
RULES = {
    "sgd, momentum": ("sgd:momentum=0.9", 0.1),
    "Frobenius": ("steepest:norm=frobenius,momentum=0.9", 0.2),
    "sign": ("sign", 0.001),
    "signum": ("signum", 0.001),
    "lion": ("lion", 0.001),
    "adam": ("adam", 0.003),
    "prodigy": ("prodigy", 1),
    "colnorm (l1->RMS)": ("colnorm:momentum=0.9", 0.004),
    "rownorm (RMS->linf)": ("rownorm:momentum=0.9", 0.1),
    "spectral": ("spectral", 0.02),
    "muon (Keller)": ("muon", 0.02),
    "muon (RMS)": ("muon:scale=rms", 0.02),
    "muon, polar express": ("muon:ns=polar-express", 0.02),
    "normuon": ("normuon", 0.02),
    "muon, hyperball": ("muon:hyperball=1", 0.02),
    "scion, constrained": ("scion:constrained=1,radius=10", 0.002),
    "dion": ("dion", 0.02),
    "shampoo": ("shampoo", 0.01),
    "shampoo, one side": ("oneside", 0.01),
    "soap": ("soap", 0.003),
}
EMBEDDINGS = {
    "adam": ("adam", 0.003),
    "sign": ("sign", 0.001),
    "signum": ("signum", 0.001),
    "colnorm (l1->RMS)": ("colnorm:momentum=0.9", 0.01),
    "rownorm (RMS->linf)": ("rownorm:momentum=0.9", 0.5),
    "Frobenius": ("steepest:norm=frobenius,momentum=0.9", 0.3),
}
HEADS = {
    "adam": ("adam", 0.003),
    "sign": ("sign", 0.001),
    "signum": ("signum", 0.001),
    "colnorm (l1->RMS)": ("colnorm:momentum=0.9", 0.01),
    "rownorm (RMS->linf)": ("rownorm:momentum=0.9", 0.5),
    "muon (RMS->RMS)": ("muon:scale=rms", 0.02),
    "Frobenius": ("steepest:norm=frobenius,momentum=0.9", 0.3),
}
VECTORS = {
    "adam": ("adam", 0.003),
    "sign": ("sign", 0.001),
    "signum": ("signum", 0.001),
    "sgd, momentum": ("sgd:momentum=0.9", 0.1),
}
DRAWN = ["sgd, momentum", "sign", "lion", "adam", "spectral", "muon (Keller)", "scion, constrained", "dion", "shampoo", "soap"]
WHAT = """gpt2-nano (0.1M parameters), {steps} steps of 16 x 64 bytes, the schedule of the recipes (wsd, last 60 %
decay), no weight decay but scion's own, no clipping. The rule holds the hidden matrices; everything else is `{adam}`.
Every rule gets the same budget: {tried} step sizes, each with {tuned} seeds, whose mean loss decides (tuning.py: a first
guess, four times more and less, then twice as close), then {seeds} other seeds with the best. Losses are of 32768 bytes
of validation text. Seconds are those of the processor, one thread, start and validation included."""
ROLES = """**Which norm for the other roles?** Hidden matrices keep `muon:lr=0.02`; one of the others gets a rule and the
rest stays with `{adam}`: embedding (the tied head with it) and position, a head that is not tied (`tied=0`), or vectors. The
same budget, King James Bible."""


def main(lab, page, corpora):
    steps, seeds = (4, 1) if lab.quick else (300, 3)
    base = lab.base | {"steps": steps, "schedule": "wsd:cooldown=0.6", "val-every": max(1, steps // 8),
                   "embedding": ADAM, "position": ADAM, "vector": ADAM}
    texts = [name for name in corpora if name != "one batch"]
    races = {text: enter(lab, base | corpora[text], RULES, ["hidden"], seeds, f"race, {text}") for text in texts}
    base = base | corpora["bible"] | {"hidden": "muon:lr=0.02"}
    roles = {"embedding, head, position": enter(lab, base, EMBEDDINGS, ["embedding", "position"], seeds, "race, embeddings"),
             "head, not tied": enter(lab, base | UNTIED, HEADS, ["head"], seeds, "race, heads"),
             "vectors": enter(lab, base, VECTORS, ["vector"], seeds, "race, vectors")}

    parts = [rules_table(races, texts)]
    for text in texts:
        draw(page, races[text], text)
        parts += [picture(f"loss against tokens, {text}", f"race-{text}-tokens.png"),
                  picture(f"loss against seconds, {text}", f"race-{text}-seconds.png")]
    parts += [ROLES.format(adam=ADAM)] + [roles_table(role, entries) for role, entries in roles.items()]
    every = {**{f"hidden, {text}": race for text, race in races.items()}, **roles}
    summary = {what: {name: {"lr": entry["lr"], "edge": entry["edge"], "loss": entry["loss"], "error": entry["error"]}
                      for name, entry in race.items()} for what, race in every.items()}
    what = WHAT.format(steps=steps, seeds=seeds, adam=ADAM, tried=TRIED, tuned=len(SEEDS))
    page.section("race", "A race on real text", what, parts, summary,
                 [run for race in every.values() for entry in race.values() for run in entry["all"]])


def enter(lab, base, rules, roles, seeds, what):
    """{name: what was found} of every rule in these roles."""
    def options(rule):
        return lambda lr: base | {role: f"{rule}{',' if ':' in rule else ':'}lr={lr:.6g}" for role in roles}
    cases = {name: (options(rule), first) for name, (rule, first) in rules.items()}
    tuned = tune(lab, cases, what)
    plans = [(name, cases[name][0](lr) | {"seed": 11 + seed}) for name, (lr, _, _) in tuned.items() for seed in range(seeds)]
    runs = lab.train([plan for _, plan in plans], f"{what}, {seeds} seeds")
    found = {}
    for name, (lr, edge, tried) in tuned.items():
        own = [run for (owner, _), run in zip(plans, runs) if owner == name]
        loss, error = mean_and_error([run.loss for run in own])
        found[name] = {"lr": lr, "edge": edge, "loss": loss, "error": error, "runs": own, "all": tried + own,
                       "seconds": statistics.fmean(run.seconds for run in own), "rule": rules[name][0]}
    return found


def lr_text(entry):
    return number(entry["lr"]) + ("*" if entry["edge"] else "")


def rules_table(races, texts):
    first = races[texts[0]]
    head = ["hidden matrices by", "rule"] + [f"{text}: {column}" for text in texts for column in ("loss", "lr", "seconds")]
    rows = []
    for name in sorted(first, key=lambda name: first[name]["loss"]):
        row = [name, f"`{first[name]['rule']}`"]
        for text in texts:
            entry = races[text].get(name)
            row += [with_error(entry["loss"], entry["error"]), lr_text(entry), number(entry["seconds"])] if entry else ["-"] * 3
        rows.append(row)
    return table(head, rows)


def roles_table(role, entries):
    rows = [[name, f"`{entry['rule']}`", with_error(entry["loss"], entry["error"]), lr_text(entry)]
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["loss"])]
    return table([role, "rule", "loss", "lr"], rows)


def draw(page, race, text):
    """Mean validation loss over the seeds, for the best known rules."""
    lines = {"tokens": [], "seconds": []}
    for name in DRAWN:
        runs = [run for run in race[name]["runs"] if not run.failed] if name in race else []
        if not runs:
            continue
        steps = runs[0].curve("val")[0]
        loss = [statistics.fmean(run.curve("val")[1][i] for run in runs) for i in range(len(steps))]
        seconds = [statistics.fmean(run.seconds_at(steps)[i] for run in runs) for i in range(len(steps))]
        tokens = [step * runs[0].options["batch-size"] * runs[0].options["seq-len"] / 1e6 for step in steps]
        for kind, x in (("tokens", tokens), ("seconds", seconds)):
            lines[kind].append({"x": x[1:], "y": loss[1:], "title": name, "with": "linespoints lw 2 pt 7 ps 0.6"})
    # The first losses are far above the rest: cut them, or the curves would all be flat.
    ends = sorted(line["y"][-1] for line in lines["tokens"]) or [0]
    top = ends[-1] + 0.5 * (ends[-1] - ends[0]) + 0.3
    for kind, label in (("tokens", "tokens (millions)"), ("seconds", "seconds of the processor")):
        plot(page.folder / f"race-{text}-{kind}.png", lines[kind],
             f"set yrange [*:{top:.3f}]\nset xlabel '{label}'\nset ylabel 'validation loss'\n"
             f"set key outside right\nset title 'hidden matrices by, {text}'")
