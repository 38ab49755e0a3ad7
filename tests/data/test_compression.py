"""The compressors' figures, checked with the command-line tools where they exist."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from shardwise.data.compression import compressed_bits_per_byte
from shardwise.errors import DataError

FILES = [b"the quick brown fox\n" * 200, bytes(range(256)) * 3, b""]


@pytest.mark.parametrize("tool", ["gzip", "xz"])
def test_agrees_with_the_tool(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} here")
    sizes = [len(subprocess.run([tool, "-9"], input=f, capture_output=True).stdout) for f in FILES]
    expected = 8 * sum(sizes) / sum(map(len, FILES))
    # zlib and the gzip program may differ by a few bytes in how they cut blocks.
    assert compressed_bits_per_byte(FILES)[tool] == pytest.approx(expected, rel=0.02)


def test_each_file_is_compressed_alone() -> None:
    together = compressed_bits_per_byte([FILES[0] * 10])
    alone = compressed_bits_per_byte([FILES[0]] * 10)
    assert alone["gzip"] > 3 * together["gzip"] and alone["xz"] > 3 * together["xz"]


def test_nothing_to_compress() -> None:
    with pytest.raises(DataError, match="no bytes"):
        compressed_bits_per_byte([b"", b""])
