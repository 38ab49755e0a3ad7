"""Elements of parameters on one rank: cut by tensor parallelism, then by ZeRO, with its padding."""

from __future__ import annotations

import dataclasses

from shardwise.memory.shapes import ModelShape, Part, Place, Work


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A parameter as tensor parallelism leaves it to one rank; FSDP2 cuts its rows."""

    rows: int
    columns: int = 1
    trained: bool = True

    @property
    def elements(self) -> int:
        """Before ZeRO cuts it."""
        return self.rows * self.columns

    def shard(self, holders: int) -> int:
        """Elements on each of ``holders`` ranks; the last ones may hold padding."""
        return -(-self.rows // holders) * self.columns


def products(model: ModelShape, place: Place) -> dict[str, tuple[int, int]]:
    """Rows and columns of one block's linear layers: Llama's, cut as by Shoeybi et al. 2019,
    section 3.

    Queries, gate and up by outputs, the two projections back by inputs. Key/value projections with
    fewer heads than ranks are whole on each.
    """
    d, tp = model.hidden_size, place.tp
    q, kv = query_width(model, place), model.head_width * model.num_kv_heads
    if model.num_kv_heads >= tp:
        kv //= tp
    f = -(-model.ffn_size // tp)
    attention = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
    gate = {"gate": (f, d)} if model.gated else {}
    return attention | gate | {"up": (f, d), "down": (d, f)}


def block_matrices(model: ModelShape, place: Place) -> list[Matrix]:
    """One block's parameters: `products`, norms, and what is beside them.

    Norms are whole; one over all queries or keys is cut as they are.

    A quantised weight is no parameter (`memory.quantised`).
    """
    d, tp, linear = model.hidden_size, place.tp, products(model, place)
    adapted, learns = model.adapted, model.adapted is None
    found = [Matrix(d, 1, learns)] * model.norms_per_block
    if model.qk_norm is not None:
        each = model.qk_norm == "head"
        widths = [model.head_width if each else linear[name][0] for name in ("q", "k")]
        found += [Matrix(width, 1, learns) for width in widths]
    if adapted is None or adapted.quantised is None:
        found = [Matrix(rows, columns, learns) for rows, columns in linear.values()] + found
    if adapted is None:
        return found
    # A lies as the inputs do, B as the outputs (`adapters.lora`).
    rank = adapted.rank
    for name, (rows, columns) in linear.items():
        if name in adapted.layers:
            factors = [(rank, columns), (rows, rank)]
            found += [Matrix(*shape) for shape in factors]
            found += [Matrix(*shape, trained=False) for shape in factors if adapted.subtracted]
            found += [Matrix(rows)] if adapted.magnitudes else []
    between = -(-adapted.bottleneck // tp) if adapted.cut else adapted.bottleneck
    network = [Matrix(between, d), Matrix(between), Matrix(d, between), Matrix(d)]
    return found + network * adapted.per_block


def end_matrices(model: ModelShape, place: Place, part: Part) -> list[Matrix]:
    """What stands in front of a part's blocks and behind them; a tied embedding counts once."""
    learns = model.adapted is None
    table = Matrix(-(-model.vocab_size // place.tp), model.hidden_size, learns)
    found = [table] if part.first or (part.last and model.tied) else []
    found += [Matrix(model.hidden_size, 1, learns)] if part.last else []
    return found + ([table] if part.last and not model.tied else [])


def query_width(model: ModelShape, place: Place) -> int:
    """Features of the query heads on one rank."""
    return model.num_heads * model.head_width // place.tp


def used_kv_width(model: ModelShape, place: Place) -> int:
    """Features of the key heads that one rank attends to, at least one head."""
    return max(1, model.num_kv_heads // place.tp) * model.head_width


def groups(model: ModelShape, place: Place, work: Work, part: Part) -> list[list[Matrix]]:
    """What is gathered and reduced together: the blocks one by one, or all at once.

    The ends of the part are in the last group. On a CPU only ZeRO-3 goes by blocks (see
    `parallel.data`).
    """
    blocks = [block_matrices(model, place)] * part.layers
    ends = end_matrices(model, place, part)
    if place.zero == 3 or work.device != "cpu":
        return [*blocks, ends]
    return [[m for block in blocks for m in block] + ends]


def local(group: list[Matrix]) -> int:
    """Elements of a group before ZeRO cuts it."""
    return sum(m.elements for m in group)


def sharded(group: list[Matrix], holders: int) -> int:
    """Elements of a group on each rank that shares it."""
    return sum(m.shard(holders) for m in group)


def gathered(group: list[Matrix], holders: int) -> int:
    """Elements of a group when gathered, padding included."""
    return holders * sharded(group, holders)


def learned(group: list[Matrix]) -> list[Matrix]:
    """Those that are trained: they alone have gradients and optimizer states."""
    return [m for m in group if m.trained]


def held(model: ModelShape, place: Place) -> int:
    """Elements of all parameters on this rank."""
    block = sharded(block_matrices(model, place), place.holders)
    return sum(
        part.layers * block + sharded(end_matrices(model, place, part), place.holders)
        for part in place.parts
    )


def trained(model: ModelShape, place: Place) -> int:
    """Of `held`, what is trained.

    Not the second copy of a tied embedding, where one rank holds both ends in parts: it has neither
    a gradient nor optimizer state of its own.
    """
    if model.adapted is not None:
        block = sharded(learned(block_matrices(model, place)), place.holders)
        return sum(part.layers * block for part in place.parts)
    ends = [p for p in place.parts if p.first != p.last]
    twice = model.tied and any(p.first for p in ends) and any(p.last for p in ends)
    table = Matrix(-(-model.vocab_size // place.tp), model.hidden_size)
    return held(model, place) - (table.shard(place.holders) if twice else 0)
