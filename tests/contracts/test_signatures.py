"""The contract mechanism itself: what is extracted, and that a wrong call is refused."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.contracts import extract
from tests.contracts.signatures import checked, groups, names, signature, versions


def test_names_are_followed_through_imports(tmp_path: Path) -> None:
    package = tmp_path / "lib"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from lib.inner import Old as New, run\n")
    (package / "inner" / "__init__.py").write_text("from .deep import Old\nfrom . import deep\n")
    (package / "inner" / "deep.py").write_text(
        textwrap.dedent(
            """
            from enum import Enum
            class Kind(Enum):
                ONE = 1
                TWO = 2
            class Recipe:
                margin: int = 0
                size: int
            class Old:
                def __init__(self, a, b=None, *, c: int = 2 ** 3): ...
                def forward(self, x, /, *rest, **more): ...
            """
        )
    )
    source = extract.Source(tmp_path)

    def of(name: str) -> list[str]:
        found = source.find(name)
        assert found is not None, name
        return [" ".join(p.values()) for p in extract.parameters(found)]

    plain = "positional_or_keyword"
    assert of("lib.New") == [f"a {plain}", f"b {plain} None", "c keyword_only 2 ** 3"]
    assert of("lib.New.forward") == [
        "x positional_only",
        "rest var_positional",
        "more var_keyword",
    ]
    assert of("lib.inner.deep.Recipe") == [f"margin {plain} 0", f"size {plain}"]
    assert of("lib.inner.deep.Kind") == ["ONE member", "TWO member"]
    assert source.find("lib.run") is None and source.find("other.thing") is None


@pytest.mark.parametrize("library", sorted(extract.CALLS))
def test_data_cover_every_call_in_every_release(library: str) -> None:
    assert set(groups(library)) <= set(versions(library))
    assert {c for v in versions(library) for c in names(library, v)} == set(extract.CALLS[library])


def test_a_wrong_call_is_refused() -> None:
    call = "transformer_engine.pytorch.autocast"
    done = checked("transformer_engine", call, "2.9.0", lambda **kwargs: kwargs)
    assert done(enabled=True, recipe=1)["amax_reduction_group"] is None
    with pytest.raises(TypeError, match=r"autocast of transformer_engine 2\.9\.0.*fp8_group"):
        done(enabled=True, fp8_group=None)
    with pytest.raises(KeyError, match=r"does not exist in transformer_engine 2\.8\.0"):
        signature("transformer_engine", call, "2.8.0")
