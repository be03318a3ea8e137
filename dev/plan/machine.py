"""A machine file: rates of one kind of machine, each with where it comes from; and how long work and exchanges take there.

  name, device ("cpu" | "cuda"), ranks_per_node, exchange ("ring" | "direct"),
  shared    true where the ranks of a node share its processor: the rates are the whole node's, each rank has its part
  numbers   {key: [value, unit, source]}; keys and units below

A rank is a GPU, or a process with its part of a CPU.
"""
import json

# key: (unit, what it is). D stands for bf16 or fp32; a machine needs the numbers of one of them.
KEYS = {
    "products_D": ("FLOP/s", "large matrix products"),
    "attention_forward_D": ("FLOP/s", "causal attention forward, half of T x T counted; products_D where absent"),
    "attention_backward_D": ("FLOP/s", "the same backward; products_D where absent"),
    "newton_schulz_D": ("FLOP/s", "batched Newton-Schulz, counted as T (4 n^2 m + 2 n^3); products_D where absent"),
    "memory": ("bytes/s", "a large copy, read plus written"),
    "memory_size": ("bytes", "of a rank, or of the node where ranks share it"),
    "inside_bandwidth": ("bytes/s", "that a rank sends within its node while it receives as much"),
    "inside_latency": ("s", "of one message, or one hop of a ring, within a node"),
    "inside_small_latency": ("s", "the same for a few bytes; inside_latency where absent"),
    "between_bandwidth": ("bytes/s", "that a rank sends to other nodes; absent: one node only"),
    "between_latency": ("s", "of one message, or one hop, between nodes"),
    "between_small_latency": ("s", "the same for a few bytes; between_latency where absent"),
    "exchange_start": ("s", "once an exchange; 0 where absent"),
}
REQUIRED = ("memory", "memory_size", "inside_bandwidth", "inside_latency")


class MachineError(Exception):
    """One line: what, which file, what to do."""


def check(data, path):
    """Names the first thing that is wrong with a machine file."""
    def fail(what, do):
        raise MachineError(f"{what}, {path}, {do}")

    for key, legal in {"device": ("cpu", "cuda"), "exchange": ("ring", "direct"), "shared": (True, False)}.items():
        if data.get(key) not in legal:
            fail(f'"{key}" is {data.get(key)!r}', f"give one of {', '.join(map(str, legal))}")
    if not isinstance(data.get("name"), str) or not isinstance(data.get("ranks_per_node"), int) or data["ranks_per_node"] < 1:
        fail('"name" or "ranks_per_node" is missing or of another type', "give a text and a number above 0")
    numbers = data.get("numbers")
    if not isinstance(numbers, dict):
        fail('"numbers" is missing', "give {key: [value, unit, source]}")
    legal = {key.replace("_D", "_" + dtype): unit for key, (unit, _) in KEYS.items() for dtype in ("bf16", "fp32")}
    for key, entry in numbers.items():
        if key not in legal:
            fail(f'no number is called "{key}"', "choose from " + ", ".join(KEYS))
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], (int, float)) or not entry[0] > 0:
            fail(f'"{key}" is no [value above 0, unit, source]', "give all three")
        if entry[1] != legal[key]:
            fail(f'"{key}" is in {entry[1]}', f"give it in {legal[key]}")
        if not isinstance(entry[2], str) or len(entry[2]) < 8:
            fail(f'"{key}" has no source', "say with which command it was measured, or where it is printed")
    for key in REQUIRED:
        if key not in numbers:
            fail(f'"{key}" is missing', "measure it, or look it up")


class Machine:
    def __init__(self, data, path="the machine"):
        check(data, path)
        self.data, self.path = data, path
        self.name, self.device, self.exchange = data["name"], data["device"], data["exchange"]
        self.ranks_per_node, self.shared = data["ranks_per_node"], data["shared"]

    @staticmethod
    def read(path):
        try:
            with open(path) as file:
                return Machine(json.load(file), path)
        except (OSError, ValueError) as error:
            raise MachineError(f"no machine can be read ({error}), {path}, give one of dev/plan/machines, or make one with "
                               "dev/plan/measure.py machine") from None

    def number(self, key, fallback=None):
        entry = self.data["numbers"].get(key)
        if entry is None and fallback is None:
            raise MachineError(f'"{key}" is missing, {self.path}, measure it, or look it up')
        return fallback if entry is None else entry[0]

    def on_a_node(self, N):
        """Ranks of N on one node. A processor that nothing connects to others takes any number of them."""
        alone = self.shared and "between_bandwidth" not in self.data["numbers"]
        return N if alone else min(N, self.ranks_per_node)

    def nodes(self, N):
        return -(-N // self.on_a_node(N))

    def part(self, N):
        """The part of a node's rates that a rank has: ranks of one processor share it."""
        return 1 / self.on_a_node(N) if self.shared else 1

    def memory_size(self, N):
        return self.number("memory_size") * self.part(N)

    def seconds(self, work, dtype, N):
        """Of one rank among N for a formulas.Work: products, attention, and memory traffic one after the other."""
        products = self.number(f"products_{dtype}")
        return (work.products / products
                + work.attention_forward / self.number(f"attention_forward_{dtype}", products)
                + work.attention_backward / self.number(f"attention_backward_{dtype}", products)
                + work.bytes / self.number("memory")) / self.part(N)

    def newton_schulz_seconds(self, flops, dtype, N):
        return flops / self.number(f"newton_schulz_{dtype}", self.number(f"products_{dtype}")) / self.part(N)

    def memory_seconds(self, bytes_, N):
        return bytes_ / self.number("memory") / self.part(N)

    def hops(self, N, small=False):
        """Seconds of N - 1 messages one after the other: around a ring that enters each node once, or to N - 1 partners."""
        if N == 1:
            return 0
        nodes, word = self.nodes(N), "small_latency" if small else "latency"
        between = nodes - 1 if self.exchange == "ring" else N - self.ranks_per_node if nodes > 1 else 0
        inside = self.number(f"inside_{word}", self.number("inside_latency"))
        total = (N - 1 - between) * inside
        return total + (between * self.number(f"between_{word}", self.number("between_latency")) if between else 0)

    def exchange_seconds(self, load, received, N):
        """One reduce-scatter or all-gather whose busiest rank moves `load` bytes; `received` of them it adds up (0: none).

        ring:   one ring for each network card of a node, so between nodes it is as wide as all of them together.
        direct: of a rank's traffic the part that leaves the node goes over its own share of the network. Sums read two
                numbers and write one, on the processor that also computes."""
        if N == 1:
            return 0
        start = self.number("exchange_start", 0.0) + self.hops(N)
        inside, nodes = self.number("inside_bandwidth"), self.nodes(N)
        if self.exchange == "ring":
            width = inside if nodes == 1 else min(inside, self.ranks_per_node * self.number("between_bandwidth"))
            return start + load / width
        outside = (N - self.ranks_per_node) / (N - 1) if nodes > 1 else 0
        seconds = load * (1 - outside) / inside
        if outside:
            seconds = max(seconds, load * outside / self.number("between_bandwidth"))
        return start + seconds + self.memory_seconds(3 * received, N)

    def scalar_seconds(self, N):
        """The all-reduce of a few numbers: twice around."""
        return 2 * self.hops(N, small=True) + (self.number("exchange_start", 0.0) if N > 1 else 0)
