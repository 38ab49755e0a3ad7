"""What general compressors need for the same bytes: the bar that a trained model has to clear.

Each file is compressed alone, as the model sees it (no context from other files); the figure is the
sum of compressed bits over the sum of bytes. ``gzip`` is ``gzip -9 < file`` (an 18-byte frame, no
file name), ``xz`` is ``xz -9 < file`` (preset 9, not ``-9e``; CRC64).
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable

from shardwise.errors import DataError


def compressed_bits_per_byte(files: Iterable[bytes]) -> dict[str, float]:
    """{"gzip": bits per byte, "xz": bits per byte} of raw files; DataError if they hold no byte."""
    num_bytes = gzip_bytes = xz_bytes = 0
    for raw in files:
        num_bytes += len(raw)
        gzip_bytes += len(gzip.compress(raw, compresslevel=9, mtime=0))
        xz_bytes += len(lzma.compress(raw, format=lzma.FORMAT_XZ, preset=9))
    if not num_bytes:
        raise DataError("there are no bytes to compress; the validation files are empty")
    return {"gzip": 8 * gzip_bytes / num_bytes, "xz": 8 * xz_bytes / num_bytes}
