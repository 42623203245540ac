"""A frozen projection with a low-rank update beside it, as one step of automatic differentiation.

LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x, W frozen. Written as one function because
the frozen half needs no gradient and the update can be added in place: on two CPU cores a step then costs little
more than its two large matrix products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class LoraLinear(torch.autograd.Function):
    """`x` (n, in), `weight` (out, in) frozen, `a` (r, in), `b` (out, r) -> (n, out), all of one dtype."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return torch.addmm(x @ weight.t(), low, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b, low = ctx.saved_tensors
        grad_low = (grad @ b).mul_(ctx.scale)
        grad_x = torch.addmm(grad @ weight, grad_low, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_low.t() @ x, (grad.t() @ low).mul_(ctx.scale), None


class Pair(torch.nn.Module):
    """The two factors of one update: `a` (r, in) drawn as a linear layer's weights, `b` (out, r) zero.

    Kept in float32 for the optimiser; `cast` gives what the forward pass multiplies with.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.a = torch.nn.Parameter(torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator))
        self.b = torch.nn.Parameter(torch.zeros(outputs, rank))

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.a.to(dtype), self.b.to(dtype)
