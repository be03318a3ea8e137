"""Every formula of the cost model: FLOPs, bytes, volumes, messages, memory. No rates here; machine.py has those.

Words: L layers, C channels, V vocabulary, T tokens of a row, n tokens of one micro-batch on one rank, N ranks, b bytes of an
activation or of a weight that products read (2 for bf16, 4 for fp32). A weight is (out, in). FLOPs are 2 for a multiply-add.
"""
from dataclasses import dataclass

FP32 = 4
BYTES = {"bf16": 2, "fp32": 4}
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Model:
    """The sizes of a model, as in model/config.cpp."""
    name: str
    L: int
    NH: int
    C: int
    positions: int
    V: int = 50257

    @property
    def padded_V(self):
        """Rows of the token embedding in memory: a multiple of 128."""
        return -(-self.V // 128) * 128

    @property
    def parameters(self):
        return sum(p.size for p in parameters(self))


MODELS = {m.name: m for m in (
    Model("gpt2-nano", 3, 3, 48, 256), Model("gpt2-micro", 4, 4, 128, 256), Model("gpt2-mini", 6, 6, 192, 256),
    Model("gpt2-small", 6, 6, 384, 1024), Model("gpt2", 12, 12, 768, 1024), Model("gpt2-medium", 24, 16, 1024, 1024),
    Model("gpt2-large", 36, 20, 1280, 1024), Model("gpt2-xl", 48, 25, 1600, 1024))}
SIZES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}


@dataclass(frozen=True)
class Parameter:
    """A row of the parameter table: (rows, cols), or (rows) for a vector; q, k, v are three matrices in one."""
    name: str
    kind: str  # "hidden" | "rows" (embedding, positions: cut between rows) | "vector"
    layer: int  # -1 outside the blocks
    rows: int
    cols: int = 1
    matrices: int = 1
    padding: int = 0  # rows in memory that nobody sees

    @property
    def size(self):
        return self.rows * self.cols

    @property
    def size_in_memory(self):
        return (self.rows + self.padding) * self.cols


def parameters(m):
    """The parameter table of model/parameters.cpp, in its order."""
    table = [Parameter("wte.weight", "rows", -1, m.V, m.C, padding=m.padded_V - m.V),
             Parameter("wpe.weight", "rows", -1, m.positions, m.C)]
    for layer in range(m.L):
        h = f"h.{layer}."

        def vector(name, size):
            table.append(Parameter(h + name, "vector", layer, size))

        def linear(name, out, in_, matrices=1):
            table.append(Parameter(f"{h}{name}.weight", "hidden", layer, out, in_, matrices))
            vector(f"{name}.bias", out)

        vector("ln_1.weight", m.C)
        vector("ln_1.bias", m.C)
        linear("attn.c_attn", 3 * m.C, m.C, matrices=3)
        linear("attn.c_proj", m.C, m.C)
        vector("ln_2.weight", m.C)
        vector("ln_2.bias", m.C)
        linear("mlp.c_fc", 4 * m.C, m.C)
        linear("mlp.c_proj", m.C, 4 * m.C)
    return table + [Parameter("ln_f.weight", "vector", -1, m.C), Parameter("ln_f.bias", "vector", -1, m.C)]


def size_of(m, *kinds):
    """Parameters of these kinds; all when none is named."""
    return sum(p.size for p in parameters(m) if not kinds or p.kind in kinds)


# ------------------------------------------------------------------------------------------- arithmetic of one micro-batch

def train_flops_per_token(m, T):
    """6 (12 L C^2 + V C) + 6 L C T: what `mfu` counts (model/flops.cpp). Causal attention is half of T x T, and its backward
    pass twice its forward pass."""
    return 6 * (12 * m.L * m.C**2 + m.V * m.C) + 6 * m.L * m.C * T


@dataclass(frozen=True)
class Work:
    """What one phase takes: FLOPs of matrix products, of attention forward and backward, and bytes moved outside of both."""
    products: float = 0
    attention_forward: float = 0
    attention_backward: float = 0
    bytes: float = 0


def forward_layer(m, T, n, b):
    """Products 24 C^2 n (qkv 6, proj 2, fc and fc_proj 16). Attention 2 T C n: q k^T and p v, each T / 2 on average. Bytes:
    two residual additions with layernorm, 4 C values each."""
    return Work(24 * m.C**2 * n, 2 * T * m.C * n, 0, 8 * m.C * n * b)


def backward_layer(m, T, n, b):
    """Products 48 C^2 n (dx and dW). Attention 5 T C n: five products where forward has two, one of them made again. Bytes:
    two layernorms, 4 C values each, and 2 C for the row sums of attention's backward pass."""
    return Work(48 * m.C**2 * n, 0, 5 * T * m.C * n, 10 * m.C * n * b)


def head(m, n, b):
    """Logits, dx and dW: 6 C V n. Bytes: the logits read once and overwritten by their gradient, 2 V values a token."""
    return Work(6 * m.C * m.V * n, 0, 0, 2 * m.padded_V * n * b)


# ---------------------------------------------------------------------------------------------------------- the optimizer

def newton_schulz_flops(rows, cols, steps=NEWTON_SCHULZ_STEPS):
    """T (4 n^2 m + 2 n^3), n the smaller side: X X^T (2 n^2 m), its square (2 n^3), and their product with X (2 n^2 m)."""
    n, m = min(rows, cols), max(rows, cols)
    return steps * (4 * n * n * m + 2 * n**3)


def update_bytes(kind, b):
    """Bytes moved for one parameter by its owner. Adam (embeddings, positions, vectors): gradient 4, weight 8, m 8, v 8.
    Muon: gradient 4, momentum 8, direction written and read 2 b, weight 8. Both: the bf16 copy where there is one, 2."""
    copy = 2 if b == 2 else 0
    return (4 + 8 + 2 * b + 8 if kind == "hidden" else 4 + 8 + 8 + 8) + copy


# ------------------------------------------------------------------------------------------------- volumes, bytes per rank

def reduce_scatter_bytes(S, N):
    """(N-1)/N S: what a rank sends when S bytes of gradients go to their owners, on average over ranks."""
    return (N - 1) / N * S


def all_gather_bytes(S, N):
    """(N-1)/N S: the same for weights on their way back."""
    return (N - 1) / N * S


def all_reduce_bytes(S, N):
    """2 (N-1)/N S: a reduce-scatter and an all-gather."""
    return 2 * (N - 1) / N * S


def scheme_bytes(m, N, gradient_bytes, weight_bytes=2):
    """MB that a rank sends in a step under each way to share the optimizer's work out, as in reference/optimizers.md
    section 4: gradients of `gradient_bytes` each, weights and updates of `weight_bytes`."""
    P, H = size_of(m), size_of(m, "hidden")
    reduce_all = reduce_scatter_bytes(P * gradient_bytes, N)
    gather_all = all_gather_bytes(P * weight_bytes, N)
    gather_hidden = all_gather_bytes(H * weight_bytes, N)
    return {name: volume / 1e6 for name, volume in {
        "all-reduce, optimizer on every rank": all_reduce_bytes(P * gradient_bytes, N),
        "all-reduce, then gather hidden updates": all_reduce_bytes(P * gradient_bytes, N) + gather_hidden,
        "reduce-scatter to owners, all-gather (ours)": reduce_all + gather_all,
        "element shards, gather hidden directions": reduce_all + gather_hidden + gather_all,
        "FSDP, all-to-all to whole matrices: extra": 2 * (N - 1) / N**2 * H * weight_bytes,
    }.items()}


# ------------------------------------------------------------------------------------------- the exchanges as they are made

def sent_by(owned, rank, S):
    """Bytes that a rank sends in a reduce-scatter: all parts but its own, S - owned. Both ways of exchange."""
    return S - owned.get(rank, 0)


def largest_load(owned, N, S, way):
    """The most bytes that any rank sends or receives in one reduce-scatter of parts, `owned` {rank: bytes}, S in all; an
    all-gather is its mirror image.

    ring:   every part travels once around, from the rank behind its owner to the owner, growing by each rank's share; the
            link out of rank r carries all parts but r's own: S - owned_r.
    direct: every rank sends its share of each part straight to the owner, which receives N - 1 of them and adds them in the
            order of the ranks: max(S - owned_r, (N - 1) owned_r). Whole matrices make this uneven inside of one layer."""
    if N == 1:
        return 0
    least = min(owned.values()) if len(owned) == N else 0
    if way == "ring":
        return S - least
    return max(S - least, (N - 1) * max(owned.values(), default=0))


def messages(N):
    """Messages one after the other of a rank in one exchange: N - 1 hops of a ring, or N - 1 partners."""
    return N - 1


# ------------------------------------------------------------------------------------------------------- memory of a rank

def activation_bytes(m, n, b, logit_rows):
    """What forward keeps for backward, as model/gpt.cpp plans it, and one chunk of logits. Values per token and layer: x,
    ln1, attention, x_mid, ln2 (C each), qkv (3 C), fc and its GELU (4 C each), in b bytes; four statistics and a
    log-sum-exp per head in fp32. Outside the layers: the branch, the last x and its layernorm (3 C), two statistics, loss."""
    layer = 16 * m.C * b + (4 + m.NH) * FP32
    return n * (m.L * layer + 3 * m.C * b + 3 * FP32) + logit_rows * m.padded_V * b


def activation_gradient_bytes(m, n, b):
    """The gradient of the residual stream, of a layernorm's output, and the wide one inside the MLP: 6 C values a token."""
    return n * 6 * m.C * b


def logit_rows(m, n, b, on_cpu):
    """Rows of one chunk of logits (model/gpt.cpp): at most 50 MiB on a CPU, 1 GiB on a GPU, in equal chunks."""
    most = max(((50 << 20) if on_cpu else (1 << 30)) // (b * m.padded_V) // 64 * 64, 64)
    if on_cpu or n <= most:
        return min(most, n)
    chunks = -(-n // most)
    return min(most, (-(-n // chunks) + 63) // 64 * 64)


def weight_bytes(m, b):
    """Weights that products read, on every rank."""
    return b * sum(p.size_in_memory for p in parameters(m))


def gradient_bytes(m):
    """fp32 gradients, on every rank: they are summed before an owner sees them."""
    return FP32 * sum(p.size_in_memory for p in parameters(m))


def master_bytes(pieces, b):
    """fp32 masters of the pieces that a rank owns; where products read fp32 the weights are the masters."""
    return 0 if b == FP32 else FP32 * sum(piece.size for piece in pieces)


def state_bytes(pieces):
    """Of the pieces that a rank owns: a momentum for hidden matrices (Muon), two moments for all else (Adam)."""
    return sum((FP32 if piece.kind == "hidden" else 2 * FP32) * piece.size for piece in pieces)
