"""One step as a timeline of two lanes, computing and communicating, on the rank that has most to do.

  backward of layer l -> the reduce-scatter of its matrices starts, behind those already started, and runs beside the backward
  of layers l-1, l-2, ...; embeddings and all vectors follow, one exchange each
  all gradients at their owners -> one scalar all-reduce (norm, dual norms) -> updates: embeddings, vectors, then hidden
  matrices, all of one shape at once
  one of these done on all owners -> all-gathers of what it moved start and run beside later updates and the next forward pass;
  the forward pass of a layer waits for that of its own matrices, that of the first for the rest, too. The hidden matrices wait
  for each other, and a layer's travel as one; with gathers="shape" each shape's travel as soon as it is updated, layer by layer

A wait of the computing lane is exposed communication. Nothing is fitted: what does not fit beside the arithmetic shows.
Several steps are made, and the last one counts, so that gathers of one step hide behind the next.
"""
from dataclasses import dataclass, field

import formulas as f
import owners

STEPS = 3  # until it repeats


@dataclass
class Job:
    """What is planned: `rows` of T tokens make an update of `model`, in micro-batches of at most `batch` rows a rank."""
    model: f.Model
    machine: object
    N: int
    rows: int
    T: int = 1024
    batch: int = 64
    dtype: str = "bf16"
    gathers: str = "layer"  # one all-gather per layer, or per "shape" and layer

    @property
    def bytes(self):
        return f.BYTES[self.dtype]

    @property
    def rows_of_a_rank(self):
        """Of the rank with most of them."""
        return -(-self.rows // self.N)

    @property
    def micro_batches(self):
        """Rows of each micro-batch of the busiest rank."""
        count = -(-self.rows_of_a_rank // self.batch)
        return [self.rows_of_a_rank // count + (i < self.rows_of_a_rank % count) for i in range(count)]


@dataclass
class Step:
    """Seconds of one step, and its two lanes as (name, start, end)."""
    total: float = 0
    exposed: float = 0  # computing waited for communication
    busy: float = 0  # exchanges under way
    update: float = 0  # of the rank with most to update
    newton_schulz: float = 0
    sent: float = 0  # bytes, mean over ranks
    messages: int = 0  # one after the other, of a rank
    computing: list = field(default_factory=list)
    communicating: list = field(default_factory=list)

    @property
    def hidden_share(self):
        return 1 - self.exposed / self.busy if self.busy else 1.0


class Lanes:
    """The two lanes while they are filled."""

    def __init__(self):
        self.now, self.free, self.exposed, self.busy = 0.0, 0.0, 0.0, 0.0
        self.computing, self.communicating = [], []

    def compute(self, name, seconds):
        self.computing.append((name, self.now, self.now + seconds))
        self.now += seconds

    def start(self, name, seconds):
        """An exchange behind all earlier ones and behind what was computed so far; returns when it ends."""
        begin = max(self.free, self.now)
        self.free = begin + seconds
        self.busy += seconds
        if seconds:
            self.communicating.append((name, begin, self.free))
        return self.free

    def wait(self, end):
        self.exposed += max(0.0, end - self.now)
        self.now = max(self.now, end)


class Simulation:
    def __init__(self, job):
        self.job, self.machine, self.lanes = job, job.machine, Lanes()
        self.pieces = owners.split(job.model, job.N)
        self.sent, self.exchanges = 0.0, 0  # by a rank in a step
        self.reduces = {name: self._exchange(owned, f.FP32, adds=True)
                        for name, owned in owners.exchanges(self.pieces).items()}
        self.groups = {}  # what is updated at once: {name: pieces}
        for kind in ("rows", "vector", "hidden"):
            for piece in self.pieces:
                if piece.kind == kind:
                    self.groups.setdefault(f"{piece.rows} x {piece.cols}" if kind == "hidden" else kind, []).append(piece)
        self.gathers = {name: self._gathers(pieces) for name, pieces in self._moved().items()}
        self.updates = self._updates()
        self.gathered = {}  # when all weights of a layer, or of what lies outside, are there

    def _exchange(self, owned, bytes_, adds):
        """Seconds of a reduce-scatter (`adds`) or an all-gather of {owner: parameters}."""
        N = self.job.N
        owned = {rank: size * bytes_ for rank, size in owned.items()}
        S = sum(owned.values())
        self.sent += (N - 1) / N * S
        self.exchanges += 1
        load = f.largest_load(owned, N, S, self.machine.exchange)
        return self.machine.exchange_seconds(load, (N - 1) * max(owned.values()) if adds else 0, N)

    def _moved(self):
        """{group: pieces whose weights travel when the group is updated}."""
        if self.job.gathers == "shape":
            return self.groups
        hidden = [piece for piece in self.pieces if piece.kind == "hidden"]
        return {name: hidden if name == list(self.groups)[-1] else [] if pieces[0].kind == "hidden" else pieces
                for name, pieces in self.groups.items()}

    def _gathers(self, pieces):
        """{layer or kind: seconds} of the weights that one group of updates moved. Vectors also travel as fp32."""
        b = self.job.bytes
        return {name: self._exchange(owned, b + f.FP32 if name == "vector" and b < f.FP32 else b, adds=False)
                for name, owned in sorted(owners.exchanges(pieces).items())}

    def _updates(self):
        """{group: seconds} of the rank with most to update: all others wait for its weights."""
        N, dtype, b = self.job.N, self.job.dtype, self.job.bytes
        seconds = [{} for _ in range(N)]
        newton_schulz = [0.0] * N
        for name, pieces in self.groups.items():
            for piece in pieces:
                iterations = self.machine.newton_schulz_seconds(piece.work, dtype, N) if piece.kind == "hidden" else 0
                moved = self.machine.memory_seconds(f.update_bytes(piece.kind, b) * piece.size, N)
                newton_schulz[piece.owner] += iterations
                rank = seconds[piece.owner]
                rank[name] = rank.get(name, 0) + iterations + moved
        self.newton_schulz = max(newton_schulz)
        slowest = max(seconds, key=lambda rank: sum(rank.values()))
        return {name: slowest.get(name, 0.0) for name in self.groups}

    def run(self):
        lanes = self.lanes
        for _ in range(STEPS):
            begin, exposed, busy = lanes.now, lanes.exposed, lanes.busy
            lanes.computing, lanes.communicating = [], []
            self._step()
        return Step(total=lanes.now - begin, exposed=lanes.exposed - exposed, busy=lanes.busy - busy,
                    update=sum(self.updates.values()), newton_schulz=self.newton_schulz, sent=self.sent,
                    messages=(self.exchanges + 2) * f.messages(self.job.N),
                    computing=[(name, a - begin, b - begin) for name, a, b in lanes.computing],
                    communicating=[(name, a - begin, b - begin) for name, a, b in lanes.communicating])

    def _compute(self, name, work):
        self.lanes.compute(name, self.machine.seconds(work, self.job.dtype, self.job.N))

    def _step(self):
        for i, rows in enumerate(self.job.micro_batches):
            self._forward_backward(rows, first=i == 0, last=i == len(self.job.micro_batches) - 1)
        self._update()

    def _forward_backward(self, rows, first, last):
        job, m, lanes = self.job, self.job.model, self.lanes
        n, b = rows * job.T, job.bytes
        if first:
            lanes.wait(self.gathered.get("outside", 0.0))
        for layer in range(m.L):
            if first:
                lanes.wait(self.gathered.get(layer, 0.0))
            self._compute(f"forward {layer}", f.forward_layer(m, job.T, n, b))
        self._compute("head", f.head(m, n, b))
        for layer in reversed(range(m.L)):
            self._compute(f"backward {layer}", f.backward_layer(m, job.T, n, b))
            if last:
                lanes.start(f"reduce {layer}", self.reduces[layer])
        if last:
            for name in ("rows", "vector"):
                lanes.start(f"reduce {name}", self.reduces[name])

    def _update(self):
        lanes = self.lanes
        lanes.wait(lanes.start("scalars", self.machine.scalar_seconds(self.job.N)))  # behind all reductions
        for group, seconds in self.updates.items():
            lanes.compute(f"update {group}", seconds)
            for name, gather in self.gathers[group].items():
                layer = name if isinstance(name, int) else "outside"
                self.gathered[layer] = lanes.start(f"gather {name}", gather)


def simulate(job):
    return Simulation(job).run()


def memory(job):
    """Bytes of the rank that keeps most, by what they are for. Buffers of the communicator are not among them."""
    m, b = job.model, job.bytes
    n = max(job.micro_batches) * job.T
    owned = owners.by_owner(owners.split(m, job.N), job.N)
    most = max(owned, key=lambda pieces: f.master_bytes(pieces, b) + f.state_bytes(pieces))
    rows = f.logit_rows(m, n, b, on_cpu=job.machine.device == "cpu")
    return {"weights": f.weight_bytes(m, b), "gradients": f.gradient_bytes(m), "activations": f.activation_bytes(m, n, b, rows),
            "activation gradients": f.activation_gradient_bytes(m, n, b), "masters": f.master_bytes(most, b),
            "optimizer state": f.state_bytes(most)}
