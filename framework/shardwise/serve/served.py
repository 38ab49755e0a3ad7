"""Models under the names by which clients ask for them: the base, and adapters over it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from shardwise.adapters import peft, peft_read
from shardwise.errors import UserError
from shardwise.models.common.config import DecoderConfig
from shardwise.serve import versions

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,63}")
BASE, GIVEN = "base", "given"  # versions: without an adapter; of a folder that is one


@dataclasses.dataclass
class Served:
    """A model that is served; ``folder``: of its adapter, PEFT's own or one that `learn` fills.

    ``version``: what answers now, once that is known.
    """

    name: str
    config: DecoderConfig
    base: Mapping[str, Tensor]
    folder: Path | None = None
    version: str | None = None

    @property
    def learned(self) -> bool:
        """Whether a pointer is followed."""
        return self.folder is not None and not peft_read.is_adapter_folder(self.folder)

    def wanted(self, version: str | None = None) -> str:
        """The version to serve; None: as the pointer says, the base before there is one."""
        if not self.learned:
            if version is not None:
                raise UserError(f"{self.name} has no versions: its folder is one adapter")
            return BASE if self.folder is None else GIVEN
        assert self.folder is not None
        if version is None:
            return versions.current(self.folder) or BASE
        return version if version == BASE else versions.check_name(version)

    def weights(self, version: str) -> Iterable[tuple[str, Tensor]]:
        """Those of a version, merged. Raises CheckpointError; then nothing has been made."""
        if version == BASE:
            return list(self.base.items())
        assert self.folder is not None
        place = self.folder if version == GIVEN else versions.folder(self.folder, version)
        adapter = peft_read.read(place, self.config)
        peft_read.check_base(adapter, place, self.base)
        return list(peft.merge(self.base.items(), adapter))


def check_names(adapters: Mapping[str, str | Path], base: str) -> dict[str, Path]:
    """Folders by name. Raises UserError for a name that is none, or a folder that is missing."""
    found = {}
    for name, folder in adapters.items():
        if not _NAME.fullmatch(name) or name == base:
            raise UserError(
                f"--adapter {name}: a name has letters, digits and _.:- alone, 64 at most, and is "
                f"not the base's ({base})"
            )
        if not Path(folder).is_dir():
            raise UserError(
                f"--adapter {name}: {folder} is no folder; give an adapter of PEFT's, or make the "
                "(empty) folder that shardwise learn will fill"
            )
        found[name] = Path(folder)
    return found
