r"""The update \\( U \\) of a whole run: clipping, then each part of the flat parameters by its rule."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...runtime.host import double, float64_device
from .clipping import Clipping
from .update import Update


if TYPE_CHECKING:
    from ..tape import Cotangent, Tape


# Elements of a block. Fresh tensors of the size of a model cost more than the arithmetic on them. On smaller blocks, threads of
# a processor mostly wait for each other. A power of two, as pinned memory is rounded up to one.
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}


class Block(NamedTuple):
    """A part of the flat parameters that is updated at once."""

    part: slice
    rule: Update


class Optimizer:
    r"""
    The update of a run and its adjoint. Work goes through flat tensors in blocks.

    Args:
        parts (`list[Block]`): Rules, and what of the flat parameters each updates: everything, in order.
        rates (`list[float]`): Learning rate of every step.
        max_grad_norm (`float`): Global norm that gradients are clipped to; 0 means no clipping.
    """

    def __init__(self, parts: list[Block], rates: list[float], max_grad_norm: float):
        self.parts = parts
        self.rates = rates
        self.clipping = Clipping(max_grad_norm)
        self.num_states = max(rule.num_states for _, rule in parts)

    def blocks(self, start: int, stop: int, device: torch.device) -> list[Block]:
        """What to update at once of the elements from `start` to `stop`, counted from `start`."""
        blocks = []
        for part, rule in self.parts:
            first, last = max(part.start, start), min(part.stop, stop)
            whole = max(last - first, 1)
            size = BLOCK.get(device.type, whole) if rule.elementwise else whole
            blocks += [Block(slice(i - start, min(i + size, last) - start), rule) for i in range(first, last, size)]
        return blocks

    @torch.no_grad()
    def update_(self, step: int, rule: Update, phi: Tensor, state: tuple[Tensor, ...], grad: Tensor) -> None:
        """Updates a block in place. `grad` is as before clipping; without a `state`, zeros are used and then discarded."""
        own = state[: rule.num_states] or tuple(torch.zeros_like(phi) for _ in range(rule.num_states))
        rule.update_(step, self.rates[step], phi, own, self.clipping.clipped(step, grad))

    @torch.no_grad()
    def adjoint_(self, tape: "Tape", phi: Tensor, cotangent: "Cotangent", out: Tensor) -> float:
        r"""
        Walks the last step on the tape back, up to clipping: \\( \lambda_\phi, \lambda_s \\) after its update become those before it,
        and `phi` becomes \\( \phi_t \\), shape `(n,)`.

        `out`, shape `(n,)`, becomes the cotangent of the clipped gradient. At the first step it may be `cotangent.phi`.

        Returns:
            `float`: Its inner product with \\( g_t \\), over these elements.
        """
        step, inner = tape.last, torch.zeros((), dtype=torch.float64, device=float64_device(phi.device))
        for (part, rule), before, of_state in zip(tape.blocks, tape.replay(phi), cotangent.states(), strict=True):
            clipped = self.clipping.clipped(step, before.grad)
            of_phi = cotangent.phi[part]
            of_grad = rule.adjoint_(step, self.rates[step], before.phi, before.state, clipped, of_phi, of_state)
            inner += double(torch.dot(of_grad, before.grad))
            out[part].copy_(of_grad)
            if step > 0:
                cotangent.keep(of_state)
        return inner.item()

    @torch.no_grad()
    def clipping_adjoint_(self, tape: "Tape", out: Tensor, inner: float) -> float:
        r"""
        Walks the clipping of the same step back: `out` of [`~Optimizer.adjoint_`] becomes \\( \lambda_g \\). `inner` is what that
        returned, summed over all elements. Returns \\( \langle \lambda_g, g_t \rangle \\), over these elements.
        """
        grads = zip(tape.blocks, tape.last_gradient(), strict=True)
        return sum(self.clipping.adjoint_(tape.last, out[part], grad, inner) for (part, _), grad in grads)
