"""Who owns what: the rule of optim/owners.h, again in Python, so that a plan needs neither the program nor the ranks."""
import heapq
from dataclasses import dataclass

import formulas

# FLOPs per entry of a rule that works entry by entry. Next to Newton-Schulz it is nothing; it only says who takes the vectors.
ENTRYWISE_FLOPS = 20


@dataclass(frozen=True)
class Piece:
    """Rows of one parameter that belong to one rank: a whole matrix, a range of rows, a vector."""
    parameter: str
    kind: str
    layer: int
    rows: int
    cols: int
    owner: int
    work: float

    @property
    def size(self):
        return self.rows * self.cols


def whole(p):
    """The pieces of a parameter that is not cut by rows, without owners: (rows, work) of each."""
    rows = p.rows // p.matrices
    work = formulas.newton_schulz_flops(rows, p.cols) if p.kind == "hidden" else ENTRYWISE_FLOPS * p.size
    return [(rows, work)] * p.matrices


def ranges(p, N):
    """N nearly equal ranges of rows; the first ranks take one row more where they do not divide."""
    for rank in range(N):
        rows = p.rows // N + (rank < p.rows % N)
        if rows:
            yield Piece(p.name, p.kind, p.layer, rows, p.cols, rank, ENTRYWISE_FLOPS * rows * p.cols)


def split(model, N):
    """All pieces with their owners. Matrices in equal chunks where the number of every cost divides by N, those of one shape
    together; otherwise the largest piece first, each to the rank with the least work so far, lower ranks first."""
    table = formulas.parameters(model)
    pieces = [piece for p in table if p.kind == "rows" for piece in ranges(p, N)]
    work = [0.0] * N
    for piece in pieces:
        work[piece.owner] += piece.work

    def give(p, rows, flops, owner):
        work[owner] += flops
        pieces.append(Piece(p.name, p.kind, p.layer, rows, p.cols, owner, flops))

    banks = {}  # by cost, then by shape, in the order of the table
    for p in table:
        for rows, flops in whole(p) if p.kind == "hidden" else []:
            banks.setdefault(flops, {}).setdefault((rows, p.cols), []).append((p, rows, flops))
    banks = [sum(shapes.values(), []) for shapes in banks.values()]
    one_by_one = [(p, rows, flops) for p in table if p.kind == "vector" for rows, flops in whole(p)]
    if all(len(bank) % N == 0 for bank in banks):
        for bank in banks:
            for i, item in enumerate(bank):
                give(*item, owner=i * N // len(bank))
    else:
        one_by_one += sum(banks, [])
    load = [(flops, rank) for rank, flops in enumerate(work)]
    heapq.heapify(load)
    for item in sorted(one_by_one, key=lambda item: -item[2]):
        flops, rank = heapq.heappop(load)
        give(*item, owner=rank)
        heapq.heappush(load, (flops + item[2], rank))
    return pieces


def by_owner(pieces, N):
    """The pieces of every rank."""
    owned = [[] for _ in range(N)]
    for piece in pieces:
        owned[piece.owner].append(piece)
    return owned


def exchanges(pieces):
    """What travels together, {name: {owner: parameters}}: the matrices of a layer (its number), embeddings and positions
    ("rows"), and all vectors ("vector")."""
    lists = {}
    for piece in pieces:
        owned = lists.setdefault(piece.layer if piece.kind == "hidden" else piece.kind, {})
        owned[piece.owner] = owned.get(piece.owner, 0) + piece.size
    return lists
