"""The dense W8A8 model to compare with: nn.Linear with weights per output channel and activations per token in 8 bits.

Engines run such a model from a compressed-tensors checkpoint. Here the layers are replaced in memory, by the definitions of
`slidesparse.reference`, so that the package compressed-tensors is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slidesparse import reference
from slidesparse.format import SCHEMES, Scheme
from slidesparse.quantization import quantize_weight
from slidesparse.select import DEFAULT_IGNORE, matches


class QuantizedLinear(nn.Module):
    """y = (Σ q_w·q_x) · s_w · s_x + bias, summed in float32; 8-bit values are exact in bfloat16, in which the products are taken."""

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        values, scale = quantize_weight(linear.weight.data, scheme)
        self.scheme = scheme
        self.register_buffer("values", values.to(torch.bfloat16))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` → ``[..., N]`` of its dtype."""
        q, x_scale = reference.quantize(x.reshape(-1, x.shape[-1]), self.scheme)
        q = q.to(torch.bfloat16)
        on_gpu = x.device.type == "cuda"  # the only place where torch gives the float32 sums of bfloat16 products
        y = torch.mm(q, self.values.t(), out_dtype=torch.float32) if on_gpu else q.float() @ self.values.float().t()
        y = y * self.scale.view(1, -1) * x_scale
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def quantize_linears(model: nn.Module, scheme: str) -> int:
    """Replace the layers that a conversion would quantise; returns how many."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not matches(name, DEFAULT_IGNORE)]
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, QuantizedLinear(model.get_submodule(name), SCHEMES[scheme]))
    return len(names)
