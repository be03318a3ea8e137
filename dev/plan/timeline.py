"""One step as a timeline of two lanes, computing and communicating, on the rank that has most to do.

  backward of layer l -> the reduce-scatter of its gradients starts, behind those already started, and runs beside the
  backward of layers l-1, l-2, ...
  all gradients at their owners -> one scalar all-reduce (norm, dual norms) -> updates: first all rows and vectors, then the
  hidden matrices, all of one shape at once
  a layer's update done on all owners -> the all-gather of its weights starts, and runs beside later updates and the next
  forward pass; the forward pass of layer l waits for it

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
        self.job, self.machine = job, job.machine
        self.pieces = owners.split(job.model, job.N)
        self.owned = owners.by_owner(self.pieces, job.N)
        self.lists = owners.exchanges(self.pieces)
        self.lanes = Lanes()
        self.gathered = dict.fromkeys(self.lists, 0.0)  # when the weights of a layer are there
        self.reduces = {layer: self._exchange(layer, f.FP32, adds=True) for layer in self.lists}
        self.gathers = {layer: self._exchange(layer, job.bytes, adds=False) for layer in self.lists}
        self.updates = self._updates()

    def _exchange(self, layer, bytes_, adds):
        """Seconds of a reduce-scatter (`adds`) or an all-gather of one layer's parts."""
        N = self.job.N
        owned = {rank: size * bytes_ for rank, size in self.lists[layer].items()}
        load = f.largest_load(owned, N, sum(owned.values()), self.machine.exchange)
        return self.machine.exchange_seconds(load, (N - 1) * max(owned.values()) if adds else 0, N)

    def _updates(self):
        """[(name, seconds, Newton-Schulz seconds)]: of the slowest owner of each group, as all wait for it."""
        groups = {}
        for rank, pieces in enumerate(self.owned):
            for piece in pieces:
                name = f"{piece.rows} x {piece.cols}" if piece.kind == "hidden" else "rows and vectors"
                flops, bytes_ = groups.setdefault(name, {}).get(rank, (0, 0))
                flops += piece.work if piece.kind == "hidden" else 0
                groups[name][rank] = (flops, bytes_ + f.update_bytes(piece.kind, self.job.bytes) * piece.size)
        N, dtype = self.job.N, self.job.dtype
        seconds = {name: {rank: (self.machine.newton_schulz_seconds(flops, dtype, N), self.machine.memory_seconds(bytes_, N))
                          for rank, (flops, bytes_) in ranks.items()} for name, ranks in groups.items()}
        slowest = max(range(N), key=lambda rank: sum(sum(ranks.get(rank, (0, 0))) for ranks in seconds.values()))
        self.newton_schulz = max(sum(ranks.get(rank, (0, 0))[0] for ranks in seconds.values()) for rank in range(N))
        return [(name, sum(ranks[slowest])) for name, ranks in seconds.items() if slowest in ranks]

    def run(self):
        for step in range(STEPS):
            begin, exposed, busy = self.lanes.now, self.lanes.exposed, self.lanes.busy
            self.lanes.computing, self.lanes.communicating = [], []
            self._step()
        lanes = self.lanes
        exchanges = 2 * len(self.lists)
        volume = f.reduce_scatter_bytes(f.size_of(self.job.model) * f.FP32, self.job.N) + f.all_gather_bytes(
            f.size_of(self.job.model) * self.job.bytes, self.job.N)
        return Step(total=lanes.now - begin, exposed=lanes.exposed - exposed, busy=lanes.busy - busy,
                    update=sum(seconds for _, seconds in self.updates), newton_schulz=self.newton_schulz, sent=volume,
                    messages=(exchanges + 2) * f.messages(self.job.N, self.machine.exchange),
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
            lanes.wait(self.gathered[-1])
        for layer in range(m.L):
            if first:
                lanes.wait(self.gathered[layer])
            self._compute(f"forward {layer}", f.forward_layer(m, job.T, n, b))
        self._compute("head", f.head(m, n, b))
        for layer in reversed(range(m.L)):
            self._compute(f"backward {layer}", f.backward_layer(m, job.T, n, b))
            if last:
                lanes.start(f"reduce {layer}", self.reduces[layer])
        if last:
            lanes.start("reduce embeddings", self.reduces[-1])

    def _update(self):
        lanes = self.lanes
        lanes.wait(lanes.start("scalars", self.machine.scalar_seconds(self.job.N)))  # behind all reductions
        for name, seconds in self.updates:
            lanes.compute(f"update {name}", seconds)
            if name == "rows and vectors":
                self.gathered[-1] = lanes.start("gather embeddings", self.gathers[-1])
        for layer in range(self.job.model.L):
            self.gathered[layer] = lanes.start(f"gather {layer}", self.gathers[layer])


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
