"""The native step's parts: packing, choosing, and saying why it is not there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.ops import compiled
from shardwise.rollout import native
from shardwise.rollout.config import Sampling
from shardwise.rollout.generator import Generator
from shardwise.rollout.native import NativeBackend
from shardwise.rollout.packing import bf16_holds, in_huge_pages, pack, unpack
from shardwise.rollout.pages import Cached, PagePool
from shardwise.rollout.sampling import choose
from tests.rollout import support
from tests.support import toy


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40)
def test_packing_round_trips(num_out: int, num_in: int, dtype: torch.dtype) -> None:
    weight = torch.arange(num_out * num_in).view(num_out, num_in).to(dtype)
    packed = pack(weight)
    assert packed.numel() % (32 * 32) == 0 and packed.is_contiguous()
    assert torch.equal(unpack(packed, num_out, num_in), weight)


def test_large_weights_lie_side_by_side_and_stay_what_they_are() -> None:
    large, other = torch.randn(700, 32, 32), torch.randn(9, 32, 32).bfloat16()
    odd = torch.randn(7)
    found = in_huge_pages({"large": large, "none": None, "odd": odd, "other": other})
    assert found["none"] is None and found["odd"] is odd
    first, second = found["large"], found["other"]
    assert first is not None and torch.equal(first, large) and first.data_ptr() % (1 << 21) == 0
    assert second is not None and torch.equal(second, other)
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    assert in_huge_pages({"other": other})["other"] is other


def backend() -> NativeBackend:
    found = support.generator("llama").backend
    if not isinstance(found, NativeBackend):
        pytest.skip("no native step here")
    return found


@pytest.mark.parametrize("vocab", [1, 15, 16, 101, 513, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_choosing_agrees_with_the_reference(vocab: int, temperature: float) -> None:
    rows = 300
    generator = torch.Generator().manual_seed(vocab)
    z = torch.randn(rows, vocab, generator=generator) * 4
    u = torch.rand(rows, dtype=torch.float64, generator=generator)
    step = backend()
    for greedy in (True, False):
        sampling = Sampling(temperature=temperature, greedy=greedy)
        ours, theirs = step.choose(z, sampling, u), choose(z, sampling, u)
        same = ours[0] == theirs[0]
        torch.testing.assert_close(ours[1][same], theirs[1][same], atol=1e-5, rtol=0)
        if greedy:
            assert same.all()
        else:  # where they differ, u lies within rounding of an edge of the distribution
            cdf = (z.double() / temperature).softmax(-1).cumsum(-1)
            gap = (cdf - u[:, None]).abs().min(-1).values
            assert (gap[~same] < 1e-5).all()


@pytest.mark.parametrize("vocab", [1, 15, 16, 101, 513, 5000])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (7, 1.0), (0, 0.6), (40, 0.9), (0, 0.999)])
@pytest.mark.parametrize("size", [0.1, 4.0])
def test_what_is_cut_agrees_with_the_reference(
    vocab: int, top_k: int, top_p: float, size: float
) -> None:
    rows = 60
    generator = torch.Generator().manual_seed(vocab)
    z = (torch.randn(rows, vocab, generator=generator) * size * 8).round() / 8  # there are equals
    z[::7, ::3] = -torch.inf
    z[:, 0] = z[:, 0].clamp_min(0)
    u = torch.rand(rows, dtype=torch.float64, generator=generator)
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p)
    ours, theirs = backend().choose(z, sampling, u), choose(z, sampling, u)
    assert ours[3] is not None and theirs[3] is not None
    whole = (z.double() / 0.7).float().double().log_softmax(-1)
    for row in range(rows):
        kept, wanted = ours[3][row], theirs[3][row]
        if kept != wanted:  # one more, or one less, where the mass comes close to top_p
            longer, shorter = sorted((kept, wanted), key=len, reverse=True)
            [edge] = set(longer) - set(shorter)
            assert set(shorter) < set(longer)
            mass = whole[row][filtered_by_k(z[row], top_k)].exp().sum()
            before = whole[row][shorter].exp().sum() / mass
            assert abs(before - top_p) < 1e-5 and edge in filtered_by_k(z[row], top_k)
            continue
        full = whole[row]
        assert abs(ours[1][row] - full[ours[0][row]]) < 1e-5
        left = full[kept] - full[kept].logsumexp(0)
        cdf = left.exp().cumsum(0)
        at = kept.index(int(ours[0][row]))
        assert abs(ours[2][row] - left[at]) < 1e-5
        assert (cdf[at - 1] if at else 0.0) - 1e-5 < u[row] < cdf[at] + 1e-5


def filtered_by_k(z: torch.Tensor, top_k: int) -> list[int]:
    order = z.sort(descending=True, stable=True).indices
    return order[: top_k or None].tolist()


def test_a_cut_survives_infinities_and_nan() -> None:
    inf, nan = float("inf"), float("nan")
    z = torch.tensor([[-inf, 0.0, -inf], [-0.0, 0.0, -inf], [nan, 1.0, nan], [-inf] * 3])
    u = torch.full((4,), 0.5, dtype=torch.float64)
    token, logp, behavior, kept = backend().choose(z, Sampling(top_k=1, top_p=0.9), u)
    assert kept == [[1], [0], [], []]
    assert token.tolist() == [1, 0, 0, 0]
    assert behavior[:2].tolist() == [0.0, 0.0] and logp[2:].isnan().all()


def test_choosing_survives_infinities_and_nan() -> None:
    step = backend()
    inf, nan = float("inf"), float("nan")
    z = torch.tensor([[-inf, 0.0, -inf], [-inf, -inf, 3.0], [nan, nan, nan]])
    for u in (1e-12, 0.5, 1 - 1e-12):
        token, logp, *_ = step.choose(z, Sampling(), torch.full((3,), u, dtype=torch.float64))
        assert token[:2].tolist() == [1, 2] and 0 <= token[2] < 3
        assert logp[:2].tolist() == [0.0, 0.0] and logp[2].isnan()


def first_logits(step: NativeBackend, prompts: list[list[int]]) -> torch.Tensor:
    pool = PagePool(step.page_size, None, step.resize, step.cache.copy, step.cache.clear)
    rows = [Cached(tokens) for tokens in prompts]
    step.resize(0)
    pool.grow(len(rows))
    for row in rows:
        pool.extend(row)
    return step.forward(rows)


PROMPTS = [[(5 * i + 3 * j) % 101 for j in range(1 + i % 3)] for i in range(40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "everything"])
def test_no_row_depends_on_how_many_there_are(name: str, dtype: torch.dtype) -> None:
    """Products take rows by tiles of several sizes, and depth by blocks; the sums stay the same."""
    step = support.generator(name, dtype).backend
    if not isinstance(step, NativeBackend):
        pytest.skip("no native step here")
    alone = torch.cat([first_logits(step, [tokens]) for tokens in PROMPTS])
    for num in (*range(2, 20), 33, 40):
        assert torch.equal(first_logits(step, PROMPTS[:num]), alone[:num]), num


@pytest.mark.parametrize("name", support.CONFIGS)
def test_weights_that_bf16_holds_are_packed_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {n: p.bfloat16().float() for n, p in support.model(name).named_parameters()}
    found = []
    for narrow in (True, False):
        if not narrow:
            monkeypatch.setattr(native, "bf16_holds", lambda tensors: False)
        step = Generator(support.CONFIGS[name])
        checksum = step.update_weights(stored.items(), hf_names=False)
        if not isinstance(step.backend, NativeBackend):
            pytest.skip("no native step here")
        assert step.backend.narrow == narrow
        found.append((checksum, first_logits(step.backend, PROMPTS)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert not bf16_holds([*stored.values(), torch.tensor([1 + 2**-8])])


def test_reasons() -> None:
    def note(config: object, dtype: torch.dtype = torch.float32) -> str:
        return Generator(config, dtype).backend_note  # type: ignore[arg-type]

    assert "widths must be multiples of 32" in note(toy.llama())
    assert "dtype is torch.float64" in note(support.CONFIGS["llama"], torch.float64)


def test_a_machine_without_a_compiler_generates_too(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    compiled._loaded.cache_clear()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    try:
        generator = support.generator("llama")
        assert generator.backend_note == "plain PyTorch: there is no C++ compiler"
        assert generator.generate(support.requests(2), Sampling(max_new_tokens=3))
    finally:
        native.library.cache_clear()
        compiled._loaded.cache_clear()


def test_a_failing_compiler_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    native.library.cache_clear()
    compiled._loaded.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(compiled, "_FLAGS", "--no-such-flag")
    try:
        with pytest.raises(compiled.CannotBuildError, match=r"building it failed.*no-such-flag"):
            native.library()
    finally:
        native.library.cache_clear()
        compiled._loaded.cache_clear()


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param([], id="plain"),
        pytest.param(["-mavx2", "-mfma"], id="avx2"),
        pytest.param(["-mavx512f", "-mavx512bf16"], id="avx512bf16"),
        pytest.param(["-mavx512f", "-mamx-tile", "-mamx-bf16"], id="amx"),
    ],
)
@pytest.mark.parametrize("name", ["decode.cpp", "choose.cpp"])
def test_the_source_compiles_without_warnings(name: str, machine: list[str]) -> None:
    """Each kind of processor takes another branch; this one has only one of them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    source = Path(native.__file__).with_name(name)
    command = [
        compiler,
        *machine,
        "-std=c++17",
        "-fopenmp",
        "-Wall",
        "-Wno-psabi",
        "-Werror",
        "-fsyntax-only",
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
