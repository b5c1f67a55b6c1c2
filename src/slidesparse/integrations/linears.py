"""Which modules of a model are linear layers in what they do: subclasses may compute something else, and models may write into weights."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers lets through where a configuration, or a call, is not what a class of model expects."""

_N, _K = 6, 8


def acts_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x Wᵀ + b`` and nothing else; a subclass with a forward of its own is tried on small random weights."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    trial, generator = copy.copy(module), torch.Generator().manual_seed(0)
    weight, x, bias = (torch.randn(shape, generator=generator, device="cpu") for shape in ((_N, _K), (2, 3, _K), (_N,)))
    own = {"weight": nn.Parameter(weight), "bias": None if module.bias is None else nn.Parameter(bias)}
    trial.__dict__["_parameters"] = own
    trial.in_features, trial.out_features = _K, _N
    with torch.no_grad(), suppress(*FAILURES):
        given = trial(x)
        expected = nn.functional.linear(x, weight, None if own["bias"] is None else bias)
        return isinstance(given, torch.Tensor) and given.shape == expected.shape and torch.allclose(given, expected, atol=1e-4)
    return False


def written_layers(model: nn.Module) -> set[str]:
    """Linear layers into whose weights the model writes when it is called, as RWKV does: found by calling a model on the meta device.

    A model whose call needs more than its class's own example inputs is run as far as that goes.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    before = {name: _version(module) for name, module in linears.items()}
    with torch.no_grad(), torch.device("meta"), suppress(*FAILURES):
        ids = torch.zeros((1, 4), dtype=torch.int64)
        given = {name: value.to("meta") for name, value in (getattr(model, "dummy_inputs", None) or {"input_ids": ids}).items()}
        if getattr(model.config, "is_encoder_decoder", False):
            given.setdefault("decoder_input_ids", ids)
        model.eval()(**given)
    return {name for name, module in linears.items() if _version(module) != before[name]}


def head_layers(model: Any) -> set[str]:
    """Linear layers that turn the model's hidden states into its answer: the output embeddings, and whatever stands behind the body.

    A class whose ``base_model`` is not most of it tells of no body.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = {name for name, module in linears.items() if module is model.get_output_embeddings()}
    body = set(model.base_model.modules())
    outside = {name for name, module in linears.items() if module not in body}
    return heads | (outside if 2 * len(outside) < len(linears) else set())


def _version(module: nn.Linear) -> tuple[int, int]:
    """Which tensor holds the weights, and how often it was written into."""
    weight = module._parameters.get("weight")
    return (id(weight), -1 if weight is None else weight._version)
