"""Pictures of trees."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from shardwise.search.config import MctsConfig
from shardwise.search.picture import svg
from shardwise.search.tree import Node
from tests.search import fake

NAMES = "{http://www.w3.org/2000/svg}"


def test_a_picture_has_every_node_once() -> None:
    [tree] = fake.search(MctsConfig(simulations=30, expand=3))
    picture = ET.fromstring(svg(tree, "fake"))
    circles = picture.findall(f"{NAMES}circle")
    places = {(c.get("cx"), c.get("cy")) for c in circles}
    assert len(places) == len(circles) == len(tree.nodes)
    assert len(picture.findall(f"{NAMES}path")) == len(tree.nodes) - 1
    rings = [c for c in circles if c.get("stroke")]
    assert len(rings) == len(tree.finished())
    bold = [p for p in picture.findall(f"{NAMES}path") if p.get("stroke-width") == "2.5"]
    assert tree.answer is not None and len(bold) == tree.depth(tree.answer) == 3
    assert float(picture.get("width") or 0) > max(float(c.get("cx") or 0) for c in circles)


@given(text=st.text(max_size=40, alphabet="ab<>&\"' \n"))
def test_text_stays_text(text: str) -> None:
    tree = fake.tree()
    tree.nodes.append(Node(1, 0, [1], [-1.0], text))
    picture = ET.fromstring(svg(tree, "fake", title=text))
    assert {e.tag.removeprefix(NAMES) for e in picture} == {"rect", "text", "path", "circle"}
