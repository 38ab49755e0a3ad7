"""`follow`: a report that goes along with runs, from their files alone.

The page is written anew when a file of a run has changed, replaced atomically, and loads itself
again after `EVERY_S` seconds. Loading again, because a page that was opened from a file may fetch
nothing (browsers give each file an origin of its own), and a server would have to be reached from
where the reader sits; so it works over ssh with any shared folder, too. What the reader was looking
at (place, zoom of each chart, what is unfolded) is kept in the history's entry; a hidden page, and
one with text selected, waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shardwise.metrics.writers import METRICS_FILE, NOTES_FILE
from shardwise.report import compare
from shardwise.report.api import render, render_comparison, target_of, write
from shardwise.report.rundata import RunData, load_run
from shardwise.resilience.attempts import ATTEMPTS_FILE
from shardwise.resilience.ending import EXIT_FILE

EVERY_S = 5
FILES = (METRICS_FILE, NOTES_FILE, ATTEMPTS_FILE, EXIT_FILE, "summary.json", "config.yaml")


def follow(
    run_dirs: Sequence[Path | str],
    out: Path | None = None,
    told: Callable[[Path], object] = lambda _: None,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Keep the page of one run, or the comparison of several, up to date while one of them lives.

    ``told`` hears of the page once it is there. Returns when no run lives: at once, if none does.
    The page that is left says what was known then, and does not load itself again once it is
    written without ``live`` (`report`, `compare`). Interrupted, it is written so, too.

    Raises as `report` and `compare` do.
    """
    target = target_of(run_dirs, out)
    seen: list[tuple[int, int]] = []
    first = True
    try:
        while True:
            now = _stamps(run_dirs)
            if now != seen:
                html, living = _page(run_dirs, EVERY_S)
                if not living:
                    return
                write(target, html)
                seen = now
                if first:
                    told(target)
                first = False
            elif not any(run.living for run in _runs(run_dirs)):
                return
            wait(EVERY_S)
    except KeyboardInterrupt:
        if not first:
            write(target, _page(run_dirs, 0)[0])
        raise


def _runs(run_dirs: Sequence[Path | str]) -> list[RunData]:
    return [load_run(Path(run_dir)) for run_dir in run_dirs]


def _page(run_dirs: Sequence[Path | str], live: float) -> tuple[str, bool]:
    """The page, and whether a run lives."""
    if len(run_dirs) == 1:
        run = load_run(Path(run_dirs[0]))
        return render(run, live), run.living
    sides = compare.load(run_dirs)
    return render_comparison(sides, live), any(side.run.living for side in sides)


def _stamps(run_dirs: Sequence[Path | str]) -> list[tuple[int, int]]:
    """Size and time of every file that a page is made of; what is not there has neither."""
    found = []
    for run_dir in run_dirs:
        for name in FILES:
            try:
                about = (Path(run_dir) / name).stat()
                found.append((about.st_size, about.st_mtime_ns))
            except OSError:
                found.append((-1, 0))
    return found
