"""Mixed precision on a rank whose weights are nobody else's: what FSDP2 does, without its copies.

For a group of one rank FSDP2 still copies every weight twice and every gradient three times a step,
a tenth of a step on CPU. The arithmetic here is the same, bit for bit: weights rounded to
the compute dtype before the forward pass, each micro-batch's gradients summed in the masters'.
Only an embedding is more exact: what one micro-batch gives a token is summed in the masters', too.
"""

from __future__ import annotations

import collections

import torch
from torch import Tensor, nn

from shardwise.parallel.full_tensor import local_tensor


class ComputeCopies:
    """Copies of a model's weights in ``dtype``, in place of the weights while it computes.

    A forward pass of ``model`` puts them in; `masters` puts the weights back. Gradients arrive at
    the weights. The copies stay allocated.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.copy_of: dict[nn.Parameter, nn.Parameter] = {}
        self.places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.in_use = False
        model.register_forward_pre_hook(lambda *_: self.copies())

    def copies(self) -> None:
        """Make the model compute with up-to-date copies."""
        if self.in_use:
            return
        if not self.places:  # only now: weights that began on the meta device have been replaced
            self._find()
        with torch.no_grad():
            copies, masters = self.copy_of.values(), self.copy_of
            torch._foreach_copy_(
                [local_tensor(c) for c in copies], [local_tensor(m) for m in masters]
            )
        for module, name, master in self.places:
            module._parameters[name] = self.copy_of[master]
        self.in_use = True

    def masters(self) -> None:
        """Put the weights themselves back."""
        if self.in_use:
            for module, name, master in self.places:
                module._parameters[name] = master
            self.in_use = False

    def _find(self) -> None:
        for module in self.model.modules():
            for name, master in module._parameters.items():
                if master is not None:
                    self.places.append((module, name, master))
                    if master not in self.copy_of:  # else tied
                        self.copy_of[master] = self._copy(master)
        places = collections.Counter(master for *_, master in self.places)
        for module, _, master in self.places:
            # A micro-batch touches few rows of a vocabulary. What is tied is dense anyway.
            if type(module) is nn.Embedding and type(master) is nn.Parameter:
                module.sparse = places[master] == 1

    def _copy(self, master: nn.Parameter) -> nn.Parameter:
        value = torch.empty_like(master, dtype=self.dtype, requires_grad=False)
        copy = nn.Parameter(value, requires_grad=master.requires_grad)

        def hand_over(copy: Tensor) -> None:
            if copy.grad is None:  # its product was left for later
                return
            if copy.grad.is_sparse:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                rows = copy.grad.to(master.dtype).coalesce()  # one order of summing on any device
                master.grad.index_add_(0, rows.indices()[0], rows.values())
            elif master.grad is None:
                master.grad = copy.grad.to(master.dtype)
            else:
                local_tensor(master.grad).add_(local_tensor(copy.grad))
            copy.grad = None
            for hook in (master._post_accumulate_grad_hooks or {}).values():
                hook(master)

        if master.requires_grad:
            copy.register_post_accumulate_grad_hook(hand_over)
        return copy
