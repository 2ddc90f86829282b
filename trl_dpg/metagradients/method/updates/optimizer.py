r"""The update \\( U \\) of a run: clips the gradient, then updates each part of the flat parameters by the rule of that part."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...runtime.host import double, float64_device
from .clipping import Clipping
from .update import Update


if TYPE_CHECKING:
    from ..tape import Cotangent, Tape


# Elements of a block. Larger blocks need large new tensors, which cost more than the arithmetic on them. On smaller blocks, threads
# of a processor mostly wait for each other. The sizes are powers of two because pinned memory is rounded up to one.
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}


class Block(NamedTuple):
    """A part of the flat parameters that one call of a rule updates."""

    part: slice
    rule: Update


class Optimizer:
    r"""
    The update of a run and its adjoint, on flat tensors, block by block.

    Args:
        parts (`list[Block]`): Rules and the parts of the flat parameters that they update. The parts cover all parameters, in order.
        rates (`list[float]`): Learning rate of every step.
        max_grad_norm (`float`): Global norm that gradients are clipped to; 0 means no clipping.
    """

    def __init__(self, parts: list[Block], rates: list[float], max_grad_norm: float):
        self.parts = parts
        self.rates = rates
        self.clipping = Clipping(max_grad_norm)
        self.num_states = max(rule.num_states for _, rule in parts)

    def blocks(self, start: int, stop: int, device: torch.device) -> list[Block]:
        """The blocks of the elements from `start` to `stop`. Their slices count from `start`."""
        blocks = []
        for part, rule in self.parts:
            first, last = max(part.start, start), min(part.stop, stop)
            whole = max(last - first, 1)
            size = BLOCK.get(device.type, whole) if rule.elementwise else whole
            blocks += [Block(slice(i - start, min(i + size, last) - start), rule) for i in range(first, last, size)]
        return blocks

    @torch.no_grad()
    def update_(self, step: int, rule: Update, phi: Tensor, state: tuple[Tensor, ...], grad: Tensor) -> None:
        """Updates a block in place. `grad` is the unclipped gradient. If `state` is empty, zeros are used and then discarded."""
        own = state[: rule.num_states] or tuple(torch.zeros_like(phi) for _ in range(rule.num_states))
        rule.update_(step, self.rates[step], phi, own, self.clipping.clipped(step, grad))

    @torch.no_grad()
    def adjoint_(self, tape: "Tape", phi: Tensor, cotangent: "Cotangent", out: Tensor) -> float:
        r"""
        Adjoint of the last step on the tape, without that of clipping. \\( \lambda_\phi, \lambda_s \\) after the step's update become
        those before it, and `phi`, shape `(n,)`, becomes \\( \phi_t \\).

        `out`, shape `(n,)`, becomes the cotangent of the clipped gradient. At the first step it may be `cotangent.phi`.

        Returns:
            `float`: Inner product of `out` with \\( g_t \\), over these elements.
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
        Adjoint of the same step's clipping: `out` of [`~Optimizer.adjoint_`] becomes \\( \lambda_g \\). `inner` is the result of
        that method, summed over all elements. Returns \\( \langle \lambda_g, g_t \rangle \\), over these elements.
        """
        grads = zip(tape.blocks, tape.last_gradient(), strict=True)
        return sum(self.clipping.adjoint_(tape.last, out[part], grad, inner) for (part, _), grad in grads)
