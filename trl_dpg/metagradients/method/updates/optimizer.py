r"""
The update \\( U \\) of a run: clips the gradient, then updates each block of the flat parameters by its rule.

Clipping is that of [`~torch.nn.utils.clip_grad_norm_`]. Rules take \\( g' = c\, g \\) with
\\( c = \min(1, M / (\lVert g \rVert + 10^{-6})) \\).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...runtime.host import double, float64_device
from .update import Update


if TYPE_CHECKING:
    from ..tape import Cotangent, Tape


# Elements of a block. Larger blocks need large new tensors, which cost more than the arithmetic on them. On smaller blocks, threads
# of a processor mostly wait for each other. The sizes are powers of two because pinned memory is rounded up to one.
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}


class Block(NamedTuple):
    """A part of the flat parameters, and the rule that updates it."""

    part: slice
    rule: Update


@dataclass
class Optimizer:
    r"""
    The update of a run and its adjoint, on flat tensors, block by block.

    Attributes:
        group_blocks (`list[Block]`): A block for each group of parameters. They cover all parameters, in order.
        rates (`list[float]`): Learning rate of every step.
        max_grad_norm (`float`): \\( M \\), the norm that gradients are clipped to; 0 means no clipping.
        norms (`list[float]`): Norm of each step's gradient. Needed for clipping alone.
    """

    group_blocks: list[Block]
    rates: list[float]
    max_grad_norm: float
    norms: list[float] = field(default_factory=list)

    @property
    def num_states(self) -> int:
        """Largest number of state tensors that a rule has."""
        return max(rule.num_states for _, rule in self.group_blocks)

    def blocks(self, start: int, stop: int, device: torch.device) -> list[Block]:
        """Blocks for one call of a rule each, of the elements from `start` to `stop`. Their slices count from `start`."""
        blocks = []
        for part, rule in self.group_blocks:
            first, last = max(part.start, start), min(part.stop, stop)
            whole = max(last - first, 1)
            size = BLOCK.get(device.type, whole) if rule.elementwise else whole
            blocks += [Block(slice(i - start, min(i + size, last) - start), rule) for i in range(first, last, size)]
        return blocks

    def clip_factor(self, step: int) -> float:
        r"""The factor \\( c \\) of a step."""
        return min(1.0, self.max_grad_norm / (self.norms[step] + 1e-6)) if self.max_grad_norm > 0 else 1.0

    def _clipped(self, step: int, grad: Tensor) -> Tensor:
        factor = self.clip_factor(step)
        return grad * factor if factor < 1 else grad

    @torch.no_grad()
    def update_(self, step: int, rule: Update, phi: Tensor, state: tuple[Tensor, ...], grad: Tensor) -> None:
        """Updates a block in place. `grad` is the unclipped gradient. If `state` is empty, zeros are used and then discarded."""
        own = state[: rule.num_states] or rule.zero_state(phi)
        rule.update_(step, self.rates[step], phi, own, self._clipped(step, grad))

    @torch.no_grad()
    def adjoint_(self, tape: "Tape", phi: Tensor, cotangent: "Cotangent", out: Tensor) -> float:
        r"""
        Adjoint of the tape's current step, without that of clipping. \\( \lambda_\phi, \lambda_s \\) after the step's update become
        those before it, and `phi`, shape `(size,)`, becomes \\( \phi_t \\).

        `out`, shape `(size,)`, becomes \\( \lambda_{g'} \\). At the first step it may be `cotangent.phi`. Returns
        \\( \langle \lambda_{g'}, g_t \rangle \\) over these elements.
        """
        step = tape.current
        dot_with_grad = torch.zeros((), dtype=torch.float64, device=float64_device(phi.device))
        for (part, rule), before, of_state in zip(tape.blocks, tape.restore(phi), cotangent.states(), strict=True):
            clipped, of_phi = self._clipped(step, before.grad), cotangent.phi[part]
            of_grad = rule.adjoint_(step, self.rates[step], before.phi, before.state, clipped, of_phi, of_state)
            dot_with_grad += double(torch.dot(of_grad, before.grad))
            out[part].copy_(of_grad)
            if step > 0:
                cotangent.keep(of_state)
        return dot_with_grad.item()

    @torch.no_grad()
    def clipping_adjoint_(self, tape: "Tape", out: Tensor, dot_with_grad: float) -> float:
        r"""
        Adjoint of the same step's clipping, if it clipped:

        $$ \lambda_g = c\, \lambda_{g'} - \frac{c\, \langle \lambda_{g'}, g \rangle}{(\lVert g \rVert + 10^{-6}) \lVert g \rVert} g $$

        `out` of [`~Optimizer.adjoint_`] becomes \\( \lambda_g \\). `dot_with_grad` is the result of that method, summed over all
        elements. Returns \\( \langle \lambda_g, g_t \rangle \\) over these elements.
        """
        norm, factor = self.norms[tape.current], self.clip_factor(tape.current)
        radial, result = factor * dot_with_grad / ((norm + 1e-6) * norm) if norm > 0 else 0.0, 0.0
        for (part, _), grad in zip(tape.blocks, tape.storage.stream(tape.gradients[-1]), strict=True):
            of_grad = out[part].mul_(factor).sub_(grad, alpha=radial)
            result += torch.dot(of_grad, grad).item()
        return result
