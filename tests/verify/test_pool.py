"""The rank pool: whose error it was, and where; who hangs, and where; worlds ahead, and refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from shardwise.errors import UserError
from shardwise.parallel.layout import parse_layout
from shardwise.rollout.sharded import group_mesh
from shardwise.verify import pool as rank_pool
from shardwise.verify.rank import is_ours, place
from tests.support.pool import RankError, RankHang, RankPool


@pytest.fixture
def own() -> Iterator[RankPool]:
    """A pool whose worlds are the test's own to break."""
    pool = RankPool()
    yield pool
    pool.close()


def a_user_merges(rank: int) -> None:
    """One rank raises, and its peers wait for it."""
    if dist.get_rank() == rank:
        raise ValueError("pieces do not fit\nsecond line")
    dist.barrier()


def refuses_a_layout() -> None:
    if dist.get_rank() == 1:
        parse_layout("dp2.foo", 2)


def refuses_an_odd_group() -> None:
    group_mesh(3, torch.device("cpu"))


def library_raises() -> None:
    torch.zeros(2).view(3)


def dies(rank: int, how: int) -> None:
    """Peers meet a closed connection, perhaps before the pool has seen the death."""
    if dist.get_rank() == rank:
        if how:
            os.kill(os.getpid(), how)
        os._exit(3)
    dist.all_reduce(torch.ones(1))


def raises_later_than_its_cause() -> None:
    """Rank 2 is the cause; what rank 0 raises is said by gloo about a peer, and comes first."""
    if dist.get_rank() == 0:
        raise RuntimeError("[tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4711")
    time.sleep(0.2)
    if dist.get_rank() == 2:
        raise KeyError("the cause")


def one_waits_for_ever() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def ident() -> tuple[int, int]:
    return os.getpid(), dist.get_world_size()


def test_an_error_is_told_with_rank_place_and_cause(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(a_user_merges, 2, world=3)
    error = caught.value
    assert (error.rank, error.cause) == (2, "ValueError")
    assert error.message == "pieces do not fit\nsecond line"
    line = a_user_merges.__code__.co_firstlineno + 3
    assert error.where == f"tests/verify/test_pool.py:{line} in a_user_merges"
    sentence, *traceback = str(error).splitlines()
    assert sentence == f"rank 2 raised ValueError at {error.where}: pieces do not fit"
    assert any("Traceback" in x for x in traceback) and not error.others


def test_the_place_is_ours_even_if_a_library_raised(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"raised ConfigError at parallel/layout.py:"):
        ranks.run(refuses_a_layout, world=2)
    with pytest.raises(RankError) as caught:
        ranks.run(library_raises, world=2)
    assert caught.value.where.endswith("in library_raises")
    assert not caught.value.others  # the same of both ranks


def test_whoever_called_from_another_file_is_told(ranks: RankPool) -> None:
    told = r"raised \w+ at parallel/[^,]+, called at rollout/sharded.py:\d+ in group_mesh: "
    with pytest.raises(RankError, match=told):
        ranks.run(refuses_an_odd_group, world=2)


def test_only_our_files_are_ours() -> None:
    assert is_ours(rank_pool.__file__) and is_ours(__file__)
    assert not is_ours(torch.__file__) and not is_ours(os.__file__) and not is_ours("<string>")
    assert place(rank_pool.__file__, 3, "f") == "verify/pool.py:3 in f"


@pytest.mark.parametrize(
    ("how", "said"), [(0, "exit code 3"), (signal.SIGSEGV, "killed by SIGSEGV")]
)
def test_a_dead_rank_is_the_cause_of_what_its_peers_say(own: RankPool, how: int, said: str) -> None:
    with pytest.raises(RankError) as caught:
        own.run(dies, 1, int(how), world=3)
    assert caught.value.rank == 1
    assert str(caught.value).splitlines()[0] == f"rank 1 died: {said}"


def test_a_lost_peer_is_not_the_cause(own: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        own.run(raises_later_than_its_cause, world=3)
    assert (caught.value.rank, caught.value.cause) == (2, "KeyError")
    # On a busy machine, a peer may have said nothing by then.
    assert all("Connection closed" in said for said in caught.value.others.values())


def test_a_hang_says_who_and_where(own: RankPool) -> None:
    own.run(ident, world=3)  # a busy machine may import this module for a second
    with pytest.raises(RankHang) as caught:
        own.run(one_waits_for_ever, world=3, timeout=1.0)
    sentence, *stacks = str(caught.value).splitlines()
    first = one_waits_for_ever.__code__.co_firstlineno
    file = "tests/verify/test_pool.py"
    assert sentence.startswith("no answer in 1 s: ")
    assert f"ranks 0, 2 at {file}:{first + 3} in one_waits_for_ever" in sentence
    assert f"rank 1 at {file}:{first + 2} in one_waits_for_ever" in sentence
    assert any("barrier" in x for x in stacks)
    assert own.run(ident, world=3)[0][1] == 3  # a fresh world


def test_worlds_are_kept_and_started_ahead(own: RankPool) -> None:
    own.prepare(2, 1)
    assert sorted(own.worlds) == [1, 2]
    first = own.run(ident, world=2)
    assert own.run(ident, world=2) == first and own.run(ident, world=1)[0][1] == 1


def test_more_ranks_than_the_memory_holds_are_refused(own: RankPool) -> None:
    bytes_of = rank_pool.RANK_BYTES
    with mock.patch.object(rank_pool, "free_bytes", lambda: 7 * bytes_of):
        with pytest.raises(UserError, match=r"^8 ranks need about .* at most 7 ranks$"):
            own.run(ident, world=8)
        own.room(7)
    own.run(ident, world=2)
    with mock.patch.object(rank_pool, "free_bytes", lambda: bytes_of):
        own.room(3)  # in the place of the two that are idle
    # Memory for three comes only when the two have stopped.
    with mock.patch.object(
        rank_pool, "free_bytes", lambda: (3 if 2 not in own.worlds else 1) * bytes_of
    ):
        own.prepare(3)  # ahead, nobody has to go
        assert list(own.worlds) == [2]
        own.run(ident, world=3)
    assert list(own.worlds) == [3]


def test_free_memory_is_known_here() -> None:
    free = rank_pool.free_bytes()
    assert free is None or free > 0


# Without the usual guard.
SCRIPT = """
import os

from shardwise.verify.pool import RankPool
from tests.verify.test_pool import ident, one_waits_for_ever

def doubled(x):
    return 2 * x

os.write(1, b"ran\\n")  # a line whole: unbuffered, print would write its end by itself
pool = RankPool()
if __name__ == "__main__":
    print(*[pid for pid, _ in pool.run(ident, world=2)], flush=True)
    print(pool.run(doubled, 21, world=2), flush=True)
    pool.run(one_waits_for_ever, world=2)
"""


def test_a_users_script(tmp_path: Path) -> None:
    """Ranks run it only where a function of it is called, and end with it, waiting or not."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, file], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            told = [process.stdout.readline().strip() for _ in range(5)]
            pids = [int(pid) for pid in told[1].split()]
            assert [told[0], *told[2:]] == ["ran", "ran", "ran", "[42, 42]"]
            assert len(pids) == 2 and all(map(_runs, pids))
        finally:
            process.kill()  # it would wait for its ranks, and this for it
    until = time.monotonic() + 20
    while any(map(_runs, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(_runs, pids))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
