"""A base in few bits, in bytes on one rank: what is kept, and a weight in full while it is used.

NF4 (Dettmers et al. 2023, section 3): half a byte an element, a byte a block of 64, four a 256
blocks of the whole weight. int8 (Dettmers et al. 2022): a byte an element, four a row. With ZeRO-3
the holders share all but the last of NF4's.
"""

from __future__ import annotations

from shardwise.memory.parameters import products
from shardwise.memory.shapes import ModelShape, Place, Work

BLOCK, NESTED_BLOCK = 64, 256
INPUTS_CUT = ("o", "down")


def kept(model: ModelShape, place: Place) -> int:
    """Codes and scales of this rank's blocks; 0 where nothing is quantised.

    Of rows that are not whole blocks, at most.
    """
    if model.adapted is None or model.adapted.quantised is None:
        return 0
    of_block = sum(_weight(model, place, name) for name in products(model, place))
    return of_block * sum(part.layers for part in place.parts)


def _weight(model: ModelShape, place: Place, name: str) -> int:
    assert model.adapted is not None
    rows, columns = products(model, place)[name]
    holders = place.holders if place.zero == 3 else 1
    if model.adapted.quantised == "int8":
        return -(-rows // holders) * (columns + 4)
    whole = Place(place.parts)
    num_whole, wide = products(model, whole)[name]
    if name in INPUTS_CUT and place.tp > 1:
        inside = columns % BLOCK or wide % BLOCK  # a row may begin or end within a block
        blocks = rows * (-(-columns // BLOCK) + bool(inside))
    else:
        blocks = -(-rows * columns // BLOCK)
        blocks += bool(rows * columns % BLOCK) and rows < num_whole
    num_blocks = -(-num_whole * wide // BLOCK)
    nested = -(-num_blocks // NESTED_BLOCK)
    return -(-blocks // holders) * (BLOCK // 2 + 1) + 4 * (nested + 1)


def in_full(model: ModelShape, place: Place, work: Work) -> int:
    """The largest weight, made for a product."""
    if model.adapted is None or model.adapted.quantised is None:
        return 0
    return work.compute_bytes * max(r * c for r, c in products(model, place).values())
