"""What `torch.optim` lacks, or has otherwise, from the papers: references for the plain engine.

One process, whole tensors, one at a time; written to be read beside the papers, and shares nothing
with `shardwise.optim`. Each class says where its rule stands. States bear the names and shapes that
every engine gives them.
"""

from __future__ import annotations

import bisect
import fnmatch
import math
from typing import Any

import torch
from torch import Tensor

Params = list[dict[str, Any]]
BLOCK, LEAST = 256, 4096  # elements: of a block, and of a tensor with 8-bit moments


class _Reference(torch.optim.Optimizer):
    def __init__(self, groups: Params, config: Any) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.c = config
        for group in self.param_groups:
            [w] = group["params"]
            self.state[w] = self.zeros(group["name"], w)

    def zeros(self, name: str, w: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def rule(self, w: Tensor, g: Tensor, s: dict[str, Any], lr: float, decay: float) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            [w] = group["params"]
            if w.grad is not None:
                state = self.state[w]
                if "step" in state:
                    state["step"] += 1
                self.rule(w, w.grad, state, group["lr"], group["weight_decay"])


def _moments(w: Tensor) -> dict[str, Tensor]:
    m, v = torch.zeros_like(w.data), torch.zeros_like(w.data)
    return {"step": torch.zeros(()), "exp_avg": m, "exp_avg_sq": v}


def _adamw(w: Tensor, g: Tensor, s: dict[str, Any], lr: float, decay: float, c: Any) -> None:
    """Loshchilov and Hutter 2019, algorithm 2."""
    t = int(s["step"])
    s["exp_avg"].copy_(c.beta1 * s["exp_avg"] + (1 - c.beta1) * g)
    s["exp_avg_sq"].copy_(c.beta2 * s["exp_avg_sq"] + (1 - c.beta2) * g**2)
    m, v = s["exp_avg"] / (1 - c.beta1**t), s["exp_avg_sq"] / (1 - c.beta2**t)
    w -= lr * (m / (v.sqrt() + c.eps) + decay * w)


class Lion(_Reference):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2."""

    def zeros(self, name: str, w: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(w.data)}

    def rule(self, w: Tensor, g: Tensor, s: dict[str, Any], lr: float, decay: float) -> None:
        m = s["exp_avg"]
        update = (self.c.beta1 * m + (1 - self.c.beta1) * g).sign()
        w -= lr * (update + decay * w)
        m.copy_(self.c.beta2 * m + (1 - self.c.beta2) * g)


class Muon(_Reference):
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon), sizes after Liu et al. 2025, eq. 4.

    `torch.optim.Muon` iterates in bf16, whatever the weights are.
    """

    def zeros(self, name: str, w: Tensor) -> dict[str, Tensor]:
        if w.dim() != 2 or any(fnmatch.fnmatchcase(name, p) for p in self.c.by_adamw):
            return _moments(w)
        return {"momentum_buffer": torch.zeros_like(w.data)}

    def rule(self, w: Tensor, g: Tensor, s: dict[str, Any], lr: float, decay: float) -> None:
        if "exp_avg" in s:
            return _adamw(w, g, s, lr, decay, self.c)
        mu, buffer = self.c.momentum, s["momentum_buffer"]
        buffer.copy_(mu * buffer + (1 - mu) * g)
        x = mu * buffer + (1 - mu) * g if self.c.nesterov else buffer.clone()
        rows, columns = x.shape
        x = x.T if rows > columns else x
        x = x / max(float(x.norm()), 1e-7)
        for _ in range(self.c.ns_steps):
            s2 = x @ x.T
            x = 3.4445 * x - 4.7750 * (s2 @ x) + 2.0315 * (s2 @ (s2 @ x))
        x = x.T if rows > columns else x
        size = 0.2 * max(rows, columns) ** 0.5
        if self.c.scale == "spectral":
            size = max(1.0, rows / columns) ** 0.5
        w -= lr * (decay * w + size * x)
        return None


class AdamW8bit(_Reference):
    """Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2."""

    def zeros(self, name: str, w: Tensor) -> dict[str, Tensor]:
        if w.numel() < LEAST:
            return _moments(w)
        state = {"step": torch.zeros(())}
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{key}_codes"] = torch.zeros(w.shape, dtype=torch.uint8)
            state[f"{key}_absmax"] = w.data.new_zeros(math.ceil(w.numel() / BLOCK))
        return state

    def rule(self, w: Tensor, g: Tensor, s: dict[str, Any], lr: float, decay: float) -> None:
        if "exp_avg" in s:
            return _adamw(w, g, s, lr, decay, self.c)
        wide = {"step": s["step"]}
        for key in ("exp_avg", "exp_avg_sq"):
            levels = w.data.new_tensor(tree(key == "exp_avg"))
            values = levels[s[f"{key}_codes"].reshape(-1).long()]
            blocks = s[f"{key}_absmax"].repeat_interleave(BLOCK)[: w.numel()]
            wide[key] = (values * blocks).view(w.shape)
        _adamw(w, g, wide, lr, decay, self.c)
        for key in ("exp_avg", "exp_avg_sq"):
            for number, block in enumerate(wide[key].reshape(-1).split(BLOCK)):
                s[f"{key}_absmax"][number] = block.abs().max()
            most = s[f"{key}_absmax"].repeat_interleave(BLOCK)[: w.numel()]
            most = most.clamp(min=torch.finfo(w.dtype).tiny)
            levels = w.data.new_tensor(tree(key == "exp_avg"))
            middles = ((levels[1:] + levels[:-1]) / 2).tolist()
            scaled = (wide[key].reshape(-1) / most).tolist()
            codes = [bisect.bisect_left(middles, x) for x in scaled]
            s[f"{key}_codes"].copy_(torch.tensor(codes).view(w.shape))
        return None


class Lomo(_Reference):
    """Lv et al. 2023, algorithm 1; that it moves weights within the pass changes no number."""

    def zeros(self, name: str, w: Tensor) -> dict[str, Tensor]:
        return {}

    def rule(self, w: Tensor, g: Tensor, s: dict[str, Any], lr: float, decay: float) -> None:
        w -= lr * (g + decay * w)


class AdaLomo(_Reference):
    """Lv et al. 2024, algorithm 1, with the decay of second moments of its published code."""

    def zeros(self, name: str, w: Tensor) -> dict[str, Tensor]:
        step = {"step": torch.zeros(())}
        if w.dim() != 2:
            return step | {"variance": torch.zeros_like(w.data)}
        rows, columns = w.shape
        zeros = w.data.new_zeros
        return step | {"row_var": zeros(rows, 1), "col_var": zeros(1, columns)}

    def rule(self, w: Tensor, g: Tensor, s: dict[str, Any], lr: float, decay: float) -> None:
        c, beta = self.c, 1 - int(s["step"]) ** -self.c.decay_power
        if w.dim() == 2:
            r, k = s["row_var"], s["col_var"]
            r.copy_(beta * r + (1 - beta) * (g**2).mean(1, keepdim=True))
            k.copy_(beta * k + (1 - beta) * (g**2).mean(0, keepdim=True))
            v = r * k / r.mean().clamp(min=c.eps1)
        else:
            s["variance"].copy_(beta * s["variance"] + (1 - beta) * g**2)
            v = s["variance"]
        u = g / v.sqrt().clamp(min=c.eps1)
        u /= max(1.0, float(u.square().mean().sqrt()) / c.clip_threshold)
        size = max(c.eps2, float(w.square().mean().sqrt()))
        w *= 1 - lr * decay
        w -= lr * size * u


def tree(signed: bool) -> list[float]:
    """The dynamic tree of section 2.2: an exponent of tens, then a linear fraction."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        number = 2**exponent * (1 if signed else 2)
        edges = torch.linspace(0.1, 1, number + 1)
        fraction = (edges[1:] + edges[:-1]) / 2  # in fp32, as it was published
        for level in (fraction * 10.0 ** (exponent - 6)).tolist():
            levels += [level, -level] if signed else [level]
    return sorted(levels)


class ScheduleFree(_Reference):
    """Defazio et al. 2024, "The Road Less Scheduled", algorithm 1; weights hold x between updates.

    The algorithm's warm-up is the schedule's.
    """

    def zeros(self, name: str, w: Tensor) -> dict[str, Tensor]:
        scalars = {key: torch.zeros((), dtype=torch.float64) for key in ("weight_sum", "lr_max")}
        z, v = torch.zeros_like(w.data), torch.zeros_like(w.data)
        return {"step": torch.zeros(()), "z": z, "exp_avg_sq": v, **scalars}

    @torch.no_grad()
    def begin(self) -> None:
        """Line 3: gradients are taken at y."""
        self.x = {w: w.data.clone() for w in self.state}
        for w, s in self.state.items():
            if not int(s["step"]):
                s["z"].copy_(w)
            w.copy_((1 - self.c.beta1) * s["z"] + self.c.beta1 * w)

    @torch.no_grad()
    def end(self) -> None:
        """Back to x, whether it moved or not."""
        for w, x in self.x.items():
            w.copy_(x)
        self.x = {}

    def rule(self, w: Tensor, g: Tensor, s: dict[str, Any], lr: float, decay: float) -> None:
        c, t = self.c, int(s["step"])
        s["exp_avg_sq"].copy_(c.beta2 * s["exp_avg_sq"] + (1 - c.beta2) * g**2)
        v = s["exp_avg_sq"] / (1 - c.beta2**t)
        s["z"] -= lr * (g / (v.sqrt() + c.eps) + decay * w)
        s["lr_max"].fill_(max(float(s["lr_max"]), lr))
        s["weight_sum"] += s["lr_max"] ** 2
        share = float(s["lr_max"] ** 2 / s["weight_sum"]) if lr else 0.0
        self.x[w] = (1 - share) * self.x[w] + share * s["z"]
