"""FP8 quantisers against blocks worked out by hand, the published definitions, and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwise.ops import fp8
from shardwise.ops.fp8 import E4M3, E5M2, FP32_MAX, MAX, Recipe

KINDS = [E4M3, E5M2]
SEED = st.integers(0, 2**31)


def randn(seed: int, *shape: int, spread: float = 4.0) -> Tensor:
    """Normal numbers of very different magnitudes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.exp(spread * torch.randn(shape, generator=g))


# --- the formats -------------------------------------------------------------------------------


def decode(code: int, exponent_bits: int, bias: int) -> float:
    """A float8 by its definition (Micikevicius et al. 2022, table 1): subnormals included."""
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    if exponent == 0:
        return sign * 2.0 ** (1 - bias) * fraction
    return sign * 2.0 ** (exponent - bias) * (1.0 + fraction)


@pytest.mark.parametrize("kind,bits,bias,special", [(E4M3, 4, 7, 0x7F), (E5M2, 5, 15, 0x7C)])
def test_every_code_means_what_the_paper_says(
    kind: torch.dtype, bits: int, bias: int, special: int
) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(kind)
    found = fp8.values(codes, torch.float64).tolist()
    for code in range(256):
        if (code & 0x7F) < special:
            assert found[code] == decode(code, bits, bias)
    finite = [abs(v) for v in found if math.isfinite(v)]
    assert max(finite) == MAX[kind]


def test_casts_round_to_even_and_saturate() -> None:
    x = torch.tensor([17.0, 19.0, -18.0, 449.0, 1e9, math.inf, -math.inf, 2.0**-10, 2.0**-9])
    wanted = [16.0, 20.0, -18.0, 448.0, 448.0, 448.0, -448.0, 0.0, 2.0**-9]
    assert fp8.values(fp8.cast(x, E4M3), torch.float32).tolist() == wanted
    assert fp8.cast(torch.tensor([math.nan]), E4M3).float().isnan().all()
    assert fp8.cast(torch.tensor([1e9]), E5M2).float().item() == 57344.0


# --- scales --------------------------------------------------------------------------------------


def test_scale_from_amax_by_hand() -> None:
    # Transformer Engine's compute_scale_from_amax: 448 / amax; 1 for what is no magnitude; FP32's
    # maximum where the quotient overflows; eps as a floor.
    amax = torch.tensor([448.0, 7.0, 0.0, math.inf, math.nan, 1e-38, 1e-45])
    found = fp8.scale_from_amax(amax, E4M3).tolist()
    assert found[:5] == [1.0, 64.0, 1.0, 1.0, 1.0]
    assert found[5] == FP32_MAX and found[6] == FP32_MAX
    assert fp8.scale_from_amax(torch.tensor(0.0), E4M3, eps=7.0).item() == 64.0


def test_scales_are_one_division() -> None:
    amax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100
    exact = [float(torch.tensor(448.0).div(v)) for v in amax]
    assert fp8.scale_from_amax(amax, E4M3).tolist() == exact


@pytest.mark.parametrize(
    "amax,wanted",
    [(448.0, 1.0), (449.0, 0.5), (300.0, 1.0), (224.0, 2.0), (7.1, 32.0), (1.0, 256.0)],
)
def test_powers_of_two_round_the_scale_down(amax: float, wanted: float) -> None:
    assert fp8.scale_from_amax(torch.tensor(amax), E4M3, power_of_two=True).item() == wanted


@given(st.floats(2.0**-100, 2.0**100), st.sampled_from(KINDS))
def test_a_power_of_two_is_within_a_factor_of_two(amax: float, kind: torch.dtype) -> None:
    exact = MAX[kind] / torch.tensor(amax)
    found = fp8.scale_from_amax(torch.tensor(amax), kind, power_of_two=True)
    assert math.frexp(found.item())[0] == 0.5
    assert found <= exact < 2 * found


@pytest.mark.parametrize(
    "amax,exponent",
    [
        (448.0, 0),
        (448.1, 1),
        (447.0, 0),
        (224.0, -1),
        (225.0, 0),
        (1.0, -8),
        (500.0, 1),
        (896.0, 1),
    ],
)
def test_e8m0_rounds_up(amax: float, exponent: int) -> None:
    code = fp8.e8m0_from_amax(torch.tensor([amax]), E4M3)
    assert code.view(torch.uint8).item() - 127 == exponent
    assert code.float().item() == 2.0**exponent


def test_the_ocp_formula_would_saturate_where_ours_does_not() -> None:
    # OCP MX 1.0: 2^(floor(log2 500) - 8) = 1, so 500 would become 448. Rounded up, the scale is 2.
    x = torch.full((1, 32), 500.0)
    assert 2.0 ** (math.floor(math.log2(500.0)) - 8) == 1.0
    assert fp8.quantise_mx(x, E4M3).dequantise().unique().tolist() == [512.0]  # 250 rounds to 256


def test_e8m0_at_the_ends() -> None:
    codes = fp8.e8m0_from_amax(torch.tensor([0.0, math.inf, math.nan, FP32_MAX]), E4M3)
    assert codes.view(torch.uint8).tolist() == [0x00, 0xFE, 0xFF, 247]
    found = fp8._e8m0_reciprocal(torch.tensor([0, 127, 254, 255], dtype=torch.uint8))
    assert found[:3].tolist() == [2.0**127, 1.0, 2.0**-127] and found[3].isnan()


# --- delayed scaling -----------------------------------------------------------------------------


def steps_of_delayed(recipe: Recipe, amaxes: list[float]) -> tuple[list[float], Tensor]:
    """Scales of operand x after each step, and the last history."""
    history, scale = torch.zeros(1, recipe.history, 3), torch.ones(1, 3)
    scales = []
    for amax in amaxes:
        history, scale = fp8.delayed_update(history, scale, torch.full((1, 3), amax), recipe)
        scales.append(scale[0, 0].item())
    return scales, history[0, :, 0]


def test_delayed_scales_follow_the_window_by_hand() -> None:
    recipe = Recipe("delayed", history=3)
    scales, history = steps_of_delayed(recipe, [448.0, 44.8, 4.48, 0.448, 0.448])
    # The largest of the last three.
    assert scales == pytest.approx([1.0, 1.0, 1.0, 10.0, 100.0])
    assert history.tolist() == pytest.approx([0.0, 0.448, 0.448])


def test_delayed_most_recent_and_margin() -> None:
    recipe = Recipe("delayed", history=3, compute="most_recent", margin=2)
    assert steps_of_delayed(recipe, [448.0, 44.8])[0] == pytest.approx([0.25, 2.5])


def test_what_was_not_seen_or_is_not_finite_keeps_its_scale() -> None:
    recipe = Recipe("delayed", history=2, compute="most_recent")
    scales, _ = steps_of_delayed(recipe, [44.8, 0.0, math.inf, math.nan, 4.48])
    assert scales == pytest.approx([10.0, 10.0, 10.0, 10.0, 100.0])
    before = steps_of_delayed(recipe, [44.8])[1]
    assert torch.equal(steps_of_delayed(recipe, [44.8, 0.0])[1], before)


def test_each_operand_has_its_own_limit() -> None:
    history, scale = torch.zeros(1, 1, 3), torch.ones(1, 3)
    _, scale = fp8.delayed_update(history, scale, torch.ones(1, 3), Recipe("delayed", history=1))
    assert scale.tolist() == [[448.0, 448.0, 57344.0]]


# --- tiles ---------------------------------------------------------------------------------------


def test_tiles_of_activations_and_weights_by_hand() -> None:
    x = torch.ones(2, 256)
    x[0, :128], x[0, 128:], x[1, :128], x[1, 128:] = 3.0, 900.0, 0.0, -7.0
    q = fp8.quantise_blocks(x, (1, 128), E4M3)
    # 448/3 = 149 down to 128; 448/900 = 0.498 down to 0.25; nothing: 1; 448/7 = 64.
    assert q.scale_inv.tolist() == [[1 / 128, 4.0], [1.0, 1 / 64]]
    assert q.data_RK.float()[:, [0, 128]].tolist() == [[384.0, 224.0], [0.0, -448.0]]  # 225 to 224
    w = torch.ones(256, 128)
    w[128:] = 14.0
    square = fp8.quantise_blocks(w, (128, 128), E4M3)
    assert square.scale_inv.tolist() == [[1 / 256], [1 / 32]]
    assert torch.equal(square.dequantise(), w)
    plain = fp8.quantise_blocks(x, (1, 128), E4M3, power_of_two=False)
    assert plain.scale_inv[0].tolist() == pytest.approx([3 / 448, 900 / 448])


def test_tiles_at_an_edge_are_smaller() -> None:
    x = randn(3, 5, 200)
    q = fp8.quantise_blocks(x, (1, 128), E4M3)
    assert q.scale_inv.shape == (5, 2) and q.data_RK.shape == (5, 200)
    tail = fp8.quantise_blocks(x[:, 128:].contiguous(), (1, 128), E4M3)
    assert torch.equal(q.dequantise()[:, 128:], tail.dequantise())


@given(SEED, st.integers(1, 5), st.integers(1, 300), st.sampled_from(KINDS))
def test_tiles_know_nothing_of_each_other(
    seed: int, rows: int, columns: int, kind: torch.dtype
) -> None:
    x = randn(seed, rows, columns)
    for quantise, wide in (
        (lambda t: fp8.quantise_blocks(t, (1, 128), kind), 128),
        (lambda t: fp8.quantise_mx(t, kind), 32),
    ):
        whole = quantise(x).dequantise()
        parts = [quantise(p).dequantise() for p in x.split(wide, dim=1)]
        assert torch.equal(whole, torch.cat(parts, dim=1))


@given(SEED, st.sampled_from(KINDS), st.sampled_from(["current", "block", "mxfp8"]))
def test_errors_are_within_the_format(seed: int, kind: torch.dtype, scaling: fp8.Scaling) -> None:
    x = randn(seed, 4, 256)
    recipe = Recipe(scaling, forward=kind)
    scale = fp8.scale_from_amax(fp8.amax(x), kind)
    q = fp8.quantise(x, "x", recipe, scale)
    # Half a unit in the last place of a normal number, or of the smallest subnormal.
    relative, smallest = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}[kind]
    bound = torch.maximum(x.abs() * relative, smallest * q.spread()) * (1 + 1e-6)
    assert bool(((q.dequantise() - x).abs() <= bound).all())


@given(SEED, st.integers(-20, 20), st.sampled_from(["current", "block", "mxfp8"]))
def test_scaling_by_a_power_of_two_changes_no_element(
    seed: int, shift: int, scaling: fp8.Scaling
) -> None:
    x, recipe = randn(seed, 3, 128, spread=1.0), Recipe(scaling)
    a, b = (
        fp8.quantise(t, "x", recipe, fp8.scale_from_amax(fp8.amax(t), E4M3))
        for t in (x, x * 2.0**shift)
    )
    assert torch.equal(a.data_RK.view(torch.uint8), b.data_RK.view(torch.uint8))


@given(SEED)
def test_quantising_twice_changes_nothing(seed: int) -> None:
    for once in (fp8.quantise_mx, lambda t, k: fp8.quantise_blocks(t, (1, 128), k)):
        x = once(randn(seed, 3, 128, spread=1.0), E4M3).dequantise()
        assert torch.equal(once(x, E4M3).dequantise(), x)


# --- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["current", "block", "mxfp8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_product_is_that_of_what_the_operands_stand_for(
    scaling: fp8.Scaling, dtype: torch.dtype
) -> None:
    x, w, recipe = randn(1, 5, 256, spread=1.0), randn(2, 7, 256, spread=1.0), Recipe(scaling)
    qx, qw = (
        fp8.quantise(t, o, recipe, fp8.scale_from_amax(fp8.amax(t), E4M3))  # type: ignore[arg-type]
        for t, o in ((x, "x"), (w, "w"))
    )
    exact = qx.dequantise(torch.float64) @ qw.dequantise(torch.float64).T
    found = fp8.product(qx, qw, dtype)
    assert found.dtype == dtype
    close = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert (found.double() - exact).norm() < close * exact.norm()
