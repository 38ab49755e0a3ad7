"""A search tree as a picture: an SVG that stands for itself, without scripts or fonts."""

from __future__ import annotations

import html

from shardwise.search.tree import ANSWERED, ROOT, Node, Tree, walk

_COLUMN, _ROW, _MARGIN, _LETTER = 190, 30, 24, 6.2  # pixels
_MOST_LETTERS = 24  # of a step


def svg(tree: Tree, scorer: str, *, title: str = "") -> str:
    """The prompt on the left, a step a node, answers on the right.

    A node's colour is its worth from orange (0) to blue (1): what the search backed up to it, else
    the word of ``scorer``; grey where there is neither. Its size grows with its visits. Rings are
    finished answers, and the thick line leads to the one that was chosen.
    """
    depths = {n.id: depth for depth, n in walk(tree)}
    rows = _rows(tree)
    width = _MARGIN * 2 + _COLUMN * (max(depths.values()) + 1)
    height = _MARGIN * 2 + _ROW * (max(rows.values()) + 1) + 20
    place = {
        i: (float(_MARGIN + _COLUMN * depths[i]), _MARGIN + 20 + _ROW * rows[i]) for i in depths
    }
    chosen = set() if tree.answer is None else {n.id for n in tree.path(tree.answer)}
    parts = [_edge(tree, n, place, n.id in chosen) for n in tree.nodes[1:]]
    parts += [_node(n, place[n.id], _worth(n, scorer), n.id in chosen) for n in tree.nodes]
    head = title or f"{tree.method}: {tree.problem.question}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="sans-serif" font-size="11" '
        f'role="img" aria-label="{html.escape(head)}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{_MARGIN}" y="18" font-size="13">{html.escape(head)}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _rows(tree: Tree) -> dict[int, float]:
    """A row for each node: leaves one after the other, a parent in the middle of its children."""
    children: dict[int, list[int]] = {n.id: [] for n in tree.nodes}
    for n in tree.nodes[1:]:
        children[n.parent or ROOT].append(n.id)
    order, stack = [], [ROOT]
    while stack:
        order.append(node := stack.pop())
        stack += reversed(children[node])
    leaves = iter(range(len(order)))
    rows = {i: float(next(leaves)) for i in order if not children[i]}
    for i in reversed(order):
        if children[i]:
            rows[i] = (rows[children[i][0]] + rows[children[i][-1]]) / 2
    return rows


def _worth(node: Node, scorer: str) -> float | None:
    return node.value if node.visits else node.scores.get(scorer)


def _edge(tree: Tree, node: Node, place: dict[int, tuple[float, float]], chosen: bool) -> str:
    (x, y), (to_x, to_y) = place[node.parent or ROOT], place[node.id]
    middle = x + _COLUMN * 0.75
    look = 'stroke="#222" stroke-width="2.5"' if chosen else 'stroke="#bbb" stroke-width="1"'
    return (
        f'<path d="M{x:g} {y:g} C{middle:g} {y:g} {x + 40:g} {to_y:g} {to_x:g} {to_y:g}" '
        f'fill="none" {look}/>'
    )


def _node(node: Node, place: tuple[float, float], worth: float | None, chosen: bool) -> str:
    x, y = place
    size = 4 + min(node.visits, 64) ** 0.5
    ring = ' stroke="#222" stroke-width="2"' if node.reason == ANSWERED else ""
    words = " ".join(node.text.split()) or ("" if node.id else "prompt")
    if len(words) > _MOST_LETTERS:
        words = words[: _MOST_LETTERS - 1] + "\u2026"
    said = words if worth is None else f"{words}  {worth:.2f}"
    weight = ' font-weight="bold"' if chosen else ""
    long = len(said) * _LETTER
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="{size:.1f}" fill="{_colour(worth)}"{ring}/>'
        f'<rect x="{x + size + 2:.1f}" y="{y - 7:g}" width="{long:.0f}" height="14" fill="white" '
        'fill-opacity="0.8"/>'
        f'<text x="{x + size + 3:.1f}" y="{y + 4:g}"{weight}>{html.escape(said)}</text>'
    )


def _colour(worth: float | None) -> str:
    """Orange to blue, which colour-blind readers can tell apart."""
    if worth is None:
        return "#ccc"
    share = min(max(worth, 0.0), 1.0)
    low, high = (230, 126, 34), (31, 119, 180)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(low, high))
