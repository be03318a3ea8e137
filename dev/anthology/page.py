"""Pictures (gnuplot), tables and the page itself."""
import datetime
import json
import math
import pathlib
import re
import subprocess

COLORS = ["#0060ad", "#dd181f", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#555555", "#bcbd22"]


class Page:
    """A folder with README.md, pictures and numbers. Sections come from the experiments, words from a person."""

    def __init__(self, folder, words):
        self.folder, self.words, self.sections = pathlib.Path(folder), read_words(words), []
        self.folder.mkdir(parents=True, exist_ok=True)

    def section(self, name, title, what, parts, summary, results):
        """One experiment: what was done, the words about what was found, tables and pictures as Markdown; and the numbers
        in NAME.json: a summary and every training."""
        words = [self.words[name]] if name in self.words else []
        self.sections.append("\n\n".join([f"## {title}", what] + words + [part for part in parts if part]))
        runs = ",\n".join(json.dumps(result.record()) for result in results)
        (self.folder / f"{name}.json").write_text(f'{{"summary": {json.dumps(summary)},\n"trainings": [\n{runs}\n]}}\n')

    def finish(self, lab, seconds):
        head = f"# The Anthology, measured\n\n{self.words.get('introduction', '')}".rstrip()
        left_out = "## Left out\n\n" + "\n".join(f"- {what}: {why}" for what, why in lab.skipped)
        parts = [head, about(lab, seconds)] + self.sections + ([left_out] if lab.skipped else [])
        (self.folder / "README.md").write_text("\n\n".join(parts) + "\n")


def about(lab, seconds):
    revisions = ", ".join(sorted(lab.revisions)) or "none trained"
    return (f"Made by `make anthology` on {datetime.date.today()}, {machine()}, {lab.at_once} trainings at a time with one "
            f"thread each, float32, in {seconds / 60:.0f} minutes (less where trainings were kept from before); revision of "
            f"train_gpt: {revisions}. Every training is in the `.json` file of its section: its options, loss and seconds. "
            "Errors are standard errors of the mean over seeds. A `*` marks a best step size at the edge of those tried.")


def machine():
    text = pathlib.Path("/proc/cpuinfo").read_text() if pathlib.Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", text)
    return f"{len(names)} cores of {names[0]}" if names else "an unknown machine"


def read_words(path):
    """{section: text} of a Markdown file with a line `## section` before each text."""
    path = pathlib.Path(path)
    parts = re.split(r"^## (.*)$", path.read_text(), flags=re.M)[1:] if path.exists() else []
    return {name.strip(): text.strip() for name, text in zip(parts[::2], parts[1::2]) if text.strip()}


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def picture(text, file):
    return f"![{text}]({file})"


def number(x, digits=3):
    if x is None or math.isnan(x):
        return "-"
    return "diverged" if math.isinf(x) else f"{x:.{digits}g}"


def with_error(mean, error, digits=3):
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def plot(file, lines, settings="", size=(900, 540)):
    """Draws lines, each {"x": [..], "y": [..], "title": .., "with": .., "color": ..}, by gnuplot into a PNG."""
    panels(file, [("", lines)], 1, settings, size)


def panels(file, grid, columns, settings="", size=(420, 340)):
    """The same for several pictures beside each other, each (title, lines)."""
    blocks, draws = [], []
    for p, (title, lines) in enumerate(grid):
        curves = []
        for i, line in enumerate(lines):
            rows = [f"{x:.8g} {y:.8g}" for x, y in zip(line["x"], line["y"]) if math.isfinite(x) and math.isfinite(y)]
            if not rows:
                continue
            blocks.append(f"$data{p}_{i} << EOD\n" + "\n".join(rows) + "\nEOD\n")
            name = f"title '{line['title']}'" if line.get("title") else "notitle"
            style, color = line.get("with", "lines lw 2"), line.get("color", COLORS[i % len(COLORS)])
            curves.append(f"$data{p}_{i} with {style} lc rgb '{color}' {name}")
        if curves:
            draws.append((f"set title '{title}'\n" if title else "") + "plot " + ", ".join(curves))
    if not draws:
        return
    rows = -(-len(draws) // columns)
    size = (size[0] * min(columns, len(draws)), size[1] * rows)
    layout = f"set multiplot layout {rows},{columns}\n" if len(grid) > 1 else ""
    script = "".join(blocks) + (f"set terminal pngcairo noenhanced size {size[0]},{size[1]} font 'Helvetica,12'\n"
                                f"set output '{file}'\nset grid\n{settings}\n{layout}" + "\n".join(draws) + "\n")
    done = subprocess.run(["gnuplot"], input=script, text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"gnuplot: {done.stderr.strip()}")
