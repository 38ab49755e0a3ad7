"""Whether what was learned may be served. Pure: figures in, reasons out.

What comes from users measures whether they are served better: tasks that were fed back and that
nothing was trained on. What does not come from them bounds what feedback, poisoned or not, can
break: held-out text, and the tasks of the stages before. The latter are compared with the base
model and not with the last version, so that many small steps cannot go far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Bounds:
    """``min_lift``: by how much accuracy on held-out fed-back tasks must rise; below 0: may fall.

    ``max_forgetting``: by how much the probe may get worse: bits as a share of the base's, shares
    of tasks as a difference.
    """

    min_lift: float = 0.0
    max_forgetting: float = 0.01


@dataclasses.dataclass(frozen=True)
class FedBack:
    """On held-out fed-back tasks with a good answer: the share that is answered so, and bits a
    token of the good answers.
    """

    accuracy: float
    bits: float
    tasks: int


# Figures of evaluations that the probe judges, by the last part of their names: whether a larger
# one is better (a share), or a smaller one (bits).
_JUDGED = {
    "accuracy": True, "choice_accuracy": True, "acc": True, "exact_match": True,
    "val_bits_per_byte": False,
}  # fmt: skip


def forgetting(base: Mapping[str, object], now: Mapping[str, object]) -> dict[str, float]:
    """How much worse each judged figure became; negative: better."""
    found = {}
    for name, before in base.items():
        larger_is_better = _JUDGED.get(name.rpartition(".")[2])
        after = now.get(name)
        if larger_is_better is None or not isinstance(before, int | float):
            continue
        if not isinstance(after, int | float):  # it can no longer be measured
            found[name] = float("inf")
        elif larger_is_better:
            found[name] = float(before) - float(after)
        else:
            found[name] = (float(after) - float(before)) / max(abs(float(before)), 1e-9)
    return found


def reasons(
    before: FedBack, after: FedBack, moved: Mapping[str, float], bounds: Bounds
) -> list[str]:
    """Why a version may not be served; none: it may."""
    found = []
    # NaN fails every comparison, hence "not".
    if not after.accuracy - before.accuracy >= bounds.min_lift - 1e-9:
        found.append(
            f"held-out fed-back tasks: accuracy went from {before.accuracy:.3f} to "
            f"{after.accuracy:.3f}, and must rise by {bounds.min_lift:g}"
        )
    if not after.bits < before.bits:
        found.append(
            f"held-out fed-back tasks: good answers became no likelier ({before.bits:.3f} to "
            f"{after.bits:.3f} bits a token)"
        )
    if not moved:
        found.append("nothing was probed for forgetting")
    for name, worse in moved.items():
        if not worse <= bounds.max_forgetting + 1e-9:
            found.append(
                f"forgetting: {name} is worse than the base model's by {worse:.4f}, and "
                f"{bounds.max_forgetting:g} is allowed"
            )
    return found
