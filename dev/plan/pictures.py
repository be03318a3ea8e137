"""The pictures of dev/many_gpus.md, from the model itself: python3 dev/plan/pictures.py dev/results/many_gpus

  step.svg     both lanes of one step, and of the beginning of the next: 124M on 8 H200, 64 rows
  owners.svg   which rank owns which matrix: 124M on 8
  scaling.svg  step time and efficiency from 1 to 1,024 GPUs (gnuplot)
"""
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import formulas as f  # noqa: E402
import owners  # noqa: E402
import timeline  # noqa: E402
from machine import Machine  # noqa: E402

COLORS = {"forward": "#9ecae1", "head": "#6baed6", "backward": "#3182bd", "update": "#fdae6b", "reduce": "#74c476",
          "scalars": "#d62728", "gather": "#bcbddc", "waits": "#f0f0f0"}
RANKS = ["#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7"]


class Svg:
    def __init__(self, width, height):
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
                      'font-family="Helvetica, Arial, sans-serif" font-size="12">',
                      f'<rect width="{width}" height="{height}" fill="white"/>']

    def box(self, x, y, width, height, color, title=""):
        hint = f"<title>{title}</title>" if title else ""
        self.parts.append(f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0.4):.2f}" height="{height}" fill="{color}" '
                          f'stroke="white" stroke-width="0.5">{hint}</rect>')

    def text(self, x, y, words, anchor="start", color="#222", size=12):
        self.parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{color}" font-size="{size}">{words}</text>')

    def line(self, x1, y1, x2, y2, color="#888"):
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}" stroke="{color}" stroke-width="1"/>')

    def write(self, path):
        with open(path, "w") as file:
            file.write("\n".join(self.parts + ["</svg>"]) + "\n")


def kind(name):
    return name.split()[0]


def short(name):
    """What fits into a box: a layer's number, or nothing."""
    last = name.split()[-1]
    return last if last.isdigit() else ""


def lane(svg, y, events, scale, left):
    for name, start, end in events:
        width = (end - start) * scale
        svg.box(left + start * scale, y, width, 46, COLORS[kind(name)], f"{name}: {(end - start) * 1e3:.2f} ms")
        if width > max(8, 6 * len(short(name))):
            svg.text(left + (start + end) / 2 * scale, y + 28, short(name), "middle", "#fff" if kind(name) == "backward" else "#222", 10)


def draw_step(path):
    machine = Machine.read(os.path.join(HERE, "machines", "h200.json"))
    rows, panels = 64, (("an all-gather for every shape and layer", "shape"), ("an all-gather for every layer", "layer"))
    left, width, height = 90, 860, 190
    svg = Svg(left + width + 20, 60 + height * len(panels))
    svg.text(left, 20, f"One step of GPT-2 124M on 8 H200, {rows} rows of 1,024 tokens: predicted; numbers are layers", size=14)
    x = left
    for name, color in COLORS.items():
        svg.box(x, 32, 12, 12, color)
        svg.text(x + 16, 42, name)
        x += 24 + 8 * len(name)
    longest = 0
    for p, (title, gathers) in enumerate(panels):
        step = timeline.simulate(timeline.Job(f.MODELS["gpt2"], machine, 8, rows, gathers=gathers))
        longest = longest or step.total
        scale, top = width / longest, 60 + p * height
        svg.text(left, top + 14, f"{title}: {step.total * 1e3:.1f} ms, {step.busy * 1e3:.1f} ms of exchanges, "
                                 f"{step.exposed * 1e3:.1f} ms of them not hidden")
        for y, words in ((top + 24, "computes"), (top + 76, "exchanges")):
            svg.text(left - 8, y + 28, words, "end")
            svg.box(left, y, step.total * scale, 46, COLORS["waits"])
        lane(svg, top + 24, step.computing, scale, left)
        # What the last step left on its way is at the start of this one.
        late = [(name, start - step.total, end - step.total) for name, start, end in step.communicating if end > step.total]
        events = [(name, max(start, 0), min(end, step.total)) for name, start, end in late + step.communicating]
        lane(svg, top + 76, [event for event in events if event[2] > event[1]], scale, left)
        for ms in range(0, int(longest * 1e3) + 1):
            at = left + ms * 1e-3 * scale
            svg.line(at, top + 126, at, top + 131)
            svg.text(at, top + 145, f"{ms} ms" if ms == 0 else ms, "middle", "#666", 10)
    svg.write(path)


def draw_owners(path):
    model, N = f.MODELS["gpt2"], 8
    pieces = owners.split(model, N)
    columns = ["q", "k", "v", "out", "fc", "mlp out"]
    widths, left, top, row = [80, 80, 80, 80, 240, 240], 70, 62, 22
    svg = Svg(left + sum(widths) + 190, top + row * model.L + 92)
    svg.text(left, 20, "Who owns what: GPT-2 124M on 8 ranks. Boxes are as wide as Newton-Schulz takes long (1 to 3); "
                       "numbers are ranks", size=14)
    x = left
    for words, width in zip(columns, widths):
        svg.text(x + width / 2, top - 10, words, "middle")
        x += width
    for layer in range(model.L):
        svg.text(left - 8, top + row * layer + 15, f"layer {layer}", "end")
        x = left
        table = [p for p in pieces if p.layer == layer and p.kind == "hidden"]
        order = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        table.sort(key=lambda p: next(i for i, name in enumerate(order) if name in p.parameter))
        for piece, width in zip(table, widths):
            svg.box(x, top + row * layer, width - 2, row - 3, RANKS[piece.owner], f"{piece.parameter}: rank {piece.owner}")
            svg.text(x + width / 2, top + row * layer + 14, piece.owner, "middle", "#fff", 11)
            x += width
    for rank, owned in enumerate(owners.by_owner(pieces, N)):
        work = sum(p.work for p in owned if p.kind == "hidden") / 1e9
        state = (f.master_bytes(owned, 2) + f.state_bytes(owned)) / 1e6
        y = top + row * rank + 14
        svg.box(left + sum(widths) + 12, y - 10, 12, 12, RANKS[rank])
        svg.text(left + sum(widths) + 30, y, f"{rank}: {work:.1f} GFLOP, {state:.0f} MB")
    bottom = top + row * model.L + 14
    for name, what in (("wte", model.V), ("wpe", model.positions)):
        svg.text(left - 8, bottom + 14, name, "end")
        for rank in range(N):
            width = sum(widths) / N
            svg.box(left + rank * width, bottom, width - 2, row - 3, RANKS[rank])
            svg.text(left + (rank + 0.5) * width, bottom + 14, rank, "middle", "#fff", 11)
        svg.text(left + sum(widths) + 12, bottom + 14, f"by rows, {what:,} in all")
        bottom += row
    svg.text(left, bottom + 18, "Vectors belong whole to the ranks with the least to do. State: fp32 masters, momenta, Adam's moments.",
             color="#666")
    svg.write(path)


def main(folder):
    os.makedirs(folder, exist_ok=True)
    draw_step(os.path.join(folder, "step.svg"))
    draw_owners(os.path.join(folder, "owners.svg"))
    subprocess.run([sys.executable, "-B", os.path.join(HERE, "plan.py"), "--machine", os.path.join(HERE, "machines", "h200.json"),
                    "--model", "124M,355M,774M,1558M", "--rows-per-gpu", "64", "--gathers", "layer", "--csv", "--plot",
                    os.path.join(folder, "scaling.svg")], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python3 dev/plan/pictures.py FOLDER", file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1])
