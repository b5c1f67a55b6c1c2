"""How short the roads of a call and of a conversion are, and that compilers see one op on the first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import models
import slidesparse
import stand_ins
from layers import DTYPE, tokens
from slidesparse import pruning, reference
from slidesparse.nn import SlideSparseLinear
from slidesparse.pattern import Pattern
from slidesparse.tolerance import check_bitwise

SOURCE = Path(slidesparse.__file__).parent
# The module: its name in the package is that of the function.
w8a8 = import_module("slidesparse.ops.w8a8")
dense = import_module("slidesparse.gemm.kernels.dense")


def layer_of(n: int, k: int, scheme: str, route: str | None = None) -> SlideSparseLinear:
    layer = SlideSparseLinear.from_dense(
        pruning.prune(torch.randn(n, k), Pattern(6, 8)), torch.randn(n).to(DTYPE), pattern="6:8", scheme=scheme
    )
    layer.route = route
    return layer


def files_of(call: Callable[[], object]) -> list[str]:
    """The library's files whose code runs in a call, without what stand-ins for kernels ask of the oracle."""
    seen: set[Path] = set()

    def stands_in(frame: FrameType | None) -> bool:
        return frame is not None and (frame.f_code.co_filename == stand_ins.__file__ or stands_in(frame.f_back))

    def look(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(SOURCE) and not stands_in(frame):
            seen.add(path.relative_to(SOURCE))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(map(str, seen))


def test_a_warm_call_on_a_cpu_runs_code_of_four_files() -> None:
    layer, x = layer_of(32, 64, "int8"), tokens(5, 64)
    assert len(files_of(lambda: layer(x))) > 4, "the first call makes everything ready"
    found = files_of(lambda: layer(x))
    assert "nn/linear.py" in found and "gemm/runner.py" in found and len(found) <= 4, found


def tile_call(*arguments: object) -> Callable:
    """The launch of the int8 kernel, by the oracle."""
    return lambda q, weight, y, x_scale, w_scale, bias: y.copy_(
        stand_ins.scaled_mm(q, weight.t(), x_scale, w_scale.view(1, -1), bias, out_dtype=y.dtype, use_fast_accum=False)
    )


@pytest.mark.parametrize(
    ("scheme", "route", "kernel"),
    [
        ("int8", "slid", "ops/cusparselt_plans.py"),
        ("fp8", "slid:cusparselt:exact", "ops/cusparselt_plans.py"),
        ("int8", "dense:triton", "ops/w8a8.py"),
        ("fp8", "dense:rowwise", "gemm/kernels/dense.py"),
        ("fp8", "dense:tensorwise", "gemm/kernels/dense.py"),
    ],
)
def test_a_warm_call_on_a_card_runs_code_of_four_files(scheme: str, route: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and library are played by torch; what leads to them is real."""
    bound = dense.bound_w8a8
    stand_ins.pretend_a_card(monkeypatch)
    monkeypatch.setattr(dense, "bound_w8a8", bound)
    monkeypatch.setattr(w8a8, "_tile_call", tile_call)
    layer, x = layer_of(48, 96, scheme, route), tokens(5, 96)
    outputs: list[Tensor] = []
    layer(x)
    found = files_of(lambda: outputs.append(layer(x)))
    assert found == sorted(["nn/linear.py", "gemm/runner.py", "ops/launch.py", kernel])
    assert all(direct for direct, *_ in layer._runner.ready.calls)
    stored = layer.packed
    q, scale = reference.quantize(x, layer.scheme)
    wanted = reference.linear(q, scale, reference.restore(stored), layer.weight_scale, layer.bias, DTYPE)
    error = (outputs[0].double() - wanted.double()).abs().max(1).values
    assert (error <= 2**-6 * wanted.double().abs().max(1).values).all()


class Graphs:
    """A compiler that keeps the graphs that it was given and runs them as they are."""

    def __init__(self) -> None:
        self.ops: list[list[object]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.ops.append([node.target for node in graph.graph.nodes if "slidesparse" in str(node.target)])
        return graph.forward


@pytest.fixture
def graphs() -> Graphs:
    torch._dynamo.reset()
    return Graphs()


LINEAR = torch.ops.slidesparse.linear.default


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
def test_equal_layers_share_one_graph_for_any_number_of_tokens(scheme: str, graphs: Graphs) -> None:
    layers = [layer_of(32, 64, scheme) for _ in range(2)]
    for number, layer in enumerate(layers):
        layer.name = f"model.layers.{number}.up"
    compiled = [torch.compile(layer, backend=graphs, fullgraph=True, dynamic=True) for layer in layers]
    for m in (3, 64, 65, 200):
        for layer, run in zip(layers, compiled, strict=True):
            x = tokens(m, 64)
            check_bitwise(run(x), layer(x))
    assert graphs.ops == [[LINEAR]]


def test_layers_in_a_model_are_ops_of_its_one_graph(graphs: Graphs) -> None:
    model = nn.Sequential(layer_of(64, 48, "int8"), nn.SiLU(), layer_of(48, 64, "int8"), layer_of(48, 48, "bf16"))
    run = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    for shape in ((2, 3), (5, 7), (4, 100)):
        x = torch.randn(*shape, 48).to(DTYPE)
        check_bitwise(run(x), model(x))
    assert graphs.ops == [[LINEAR] * 3]


def test_a_layers_conversion_runs_code_of_five_packages(tmp_path: Path) -> None:
    """A package is a folder below the library's; all modules that stand in none count as one. Names of other libraries do not count."""
    # Of a class that transformers does not know, which asks for no further tensors.
    config = models.LLAMA | {"architectures": ["OwnForCausalLM"]}
    source = models.write(tmp_path / "dense", {"model.layers.0.mlp.up_proj.weight": torch.randn(64, 64).bfloat16()}, config)
    recipe = slidesparse.Recipe(slidesparse.Pattern(6, 8), "magnitude", "int8")
    slidesparse.convert(source, tmp_path / "warm", recipe)  # imports what is imported late
    found = files_of(lambda: slidesparse.convert(source, tmp_path / "out", recipe))
    packages = {file.partition("/")[0] if "/" in file else "slidesparse" for file in found}
    assert {"checkpoint", "pruning", "packing"} < packages, "the conversion itself was counted"
    assert len(packages - {"compat"}) <= 5, packages
    assert "reference.py" not in found, "the oracle judges conversions, so it takes no part in them"
