"""On a GPU: every fast path is bitwise the CPU's, conversion too, and layers keep the tolerance policy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import models
from slidesparse import packing, pruning, reference, tolerance
from slidesparse.checkpoint import Recipe, convert
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES, Packed
from slidesparse.gemm import Plan, Runner, Weights, key_of, use_plan
from slidesparse.gemm.choose import choice_of
from slidesparse.gemm.kernels import kernels
from slidesparse.gemm.tune import LinearShape, tune
from slidesparse.nn import SlideSparseLinear, place
from slidesparse.ops import cusparselt
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.quantization import quantize_weight

pytestmark = pytest.mark.needs_gpu


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(packing.integer_view(a.cpu()), packing.integer_view(b.cpu()))


@pytest.mark.parametrize("pattern", [*KNOWN, Pattern.parse("6:8x2")], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_prune_quantise_pack_restore_slide_are_bitwise_the_cpus(dtype, pattern):
    weight = torch.randn(129, pattern.group * pattern.unit * 21 + 2).to(dtype)
    pruned = pruning.prune(weight.cuda(), pattern)
    assert same(pruned, pruning.prune(weight, pattern))
    for scheme in ("int8", "fp8"):
        values, scale = quantize_weight(pruned, SCHEMES[scheme])
        cpu_values, cpu_scale = quantize_weight(pruned.cpu(), SCHEMES[scheme])
        assert same(values, cpu_values) and same(scale, cpu_scale)
        packed, expected = packing.pack(values, pattern), reference.pack(cpu_values, pattern)
        assert same(packed.values, expected.values) and torch.equal(packed.keep.cpu(), expected.keep)
        packing.check_packed(packed)
        assert same(packing.restore(packed), reference.restore(expected))
        assert same(packing.slide(packed), reference.slide(reference.restore(expected), pattern)[0])


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "nvfp4"])
def test_conversion_is_bitwise_the_cpus(tmp_path, scheme):
    pattern = Pattern.parse("6:8x2" if scheme == "nvfp4" else "6:8")
    source = models.write(tmp_path / "dense", models.llama_tensors(inner=112))
    for device in ("cpu", "cuda"):
        convert(source, tmp_path / device, Recipe(pattern, "magnitude", scheme), device=device)
    cpu, gpu = models.read(tmp_path / "cpu"), models.read(tmp_path / "cuda")
    assert cpu.keys() == gpu.keys() and all(same(cpu[name], gpu[name]) for name in cpu)


CUDA_ROUTES = [
    *(("int8", route) for route in ("dense:triton", "dense:cublaslt", "dense:exact", "packed:triton", "slid:cusparselt:exact", "slid")),
    *(("fp8", route) for route in ("dense:rowwise", "dense:tensorwise", "dense:exact", "packed", "slid:cusparselt:exact", "slid")),
    *((scheme, route) for scheme in ("bf16", "fp16") for route in ("dense:native", "packed", "slid")),
    ("nvfp4", "dense"),
]


def layer_on_gpu(scheme: str, n: int, k: int, pattern: str = "6:8", bias: bool = True) -> SlideSparseLinear:
    dtype = torch.float16 if scheme == "fp16" else torch.bfloat16
    pattern += "x2" if scheme == "nvfp4" else ""
    weight = pruning.prune(torch.randn(n, k) * 0.05, Pattern.parse(pattern)).to(dtype)
    shift = (torch.randn(n) * 3).to(dtype) if bias else None
    return SlideSparseLinear.from_dense(weight, shift, pattern=pattern, scheme=scheme).cuda()


def tokens(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different scales."""
    return torch.randn(m, k).mul(torch.logspace(-2, 2, m).unsqueeze(-1) if m else 1.0).to(dtype).cuda()


def run_or_skip(layer: SlideSparseLinear, x: torch.Tensor) -> torch.Tensor:
    try:
        return layer(x)
    except UnsupportedError as error:
        if "slid" in str(layer.route) and "nvmath" in str(error):
            pytest.skip(str(error))
        raise


def check_layer(layer: SlideSparseLinear, x: torch.Tensor, y: torch.Tensor, *, compiled: bool = False) -> None:
    """Hold outputs to the policy: one rounding bitwise for int8, the others against float64 and torch's own float32 sums.

    Where a compiler fused scales and bias, the product was rounded before, and a product and a sum may have been contracted.
    """
    scheme, bias = layer.scheme, layer.bias
    if scheme.dynamic:
        packed = layer.packed
        values = packing.restore(Packed(packed.values.cuda(), packed.keep.cuda(), packed.pattern, packed.k))
        scales = layer.weight_scale
        q, x_scale = reference.quantize(x, scheme)
    else:
        values, scales, q, x_scale = layer.dense_weight(), None, x, None
    exact = q.double() @ values.double().t()
    if x_scale is not None:
        exact = exact * scales.double().view(1, -1) * x_scale.double()
    plain = exact.float() if scheme.name != "fp8" else q.float() @ values.float().t() * scales.view(1, -1) * x_scale
    if bias is not None:
        exact, plain = exact + bias.double(), plain + bias.float()
    twice = compiled or any(kernels()[route.kernel].roundings(route.variant) == 2 for _, route in layer.routes)
    if scheme.name == "int8" and not twice:
        tolerance.check_bitwise(y, reference.linear(q, x_scale, values, scales, bias, x.dtype))
    elif scheme.name == "fp8" and y.shape[0]:
        # Fast accumulation keeps fewer bits than float32: torch's own row-wise product, which takes multiples of 16, sets the measure.
        rows, columns = -layer.out_features % 16, -layer.in_features % 16
        q, values = (F.pad(t.view(torch.int8), pad).view(t.dtype) for t, pad in ((q, (0, columns)), (values, (0, columns, 0, rows))))
        scales, shift = F.pad(scales.view(1, -1), (0, rows)), None if bias is None else F.pad(bias, (0, rows))
        plain8 = torch._scaled_mm(q, values.t(), x_scale, scales, shift, out_dtype=x.dtype, use_fast_accum=True)[:, : layer.out_features]
        check_rows(y, exact, plain8.to(x.dtype), roundings=2 if twice else 1)
    else:
        check_rows(y, exact, plain.to(x.dtype), roundings=2 if twice else 1)


def check_rows(y: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, *, roundings: int) -> None:
    """The tolerance policy in units of each row's largest: else the largest values of one row decide."""
    assert y.dtype == plain.dtype
    unit = exact.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    tolerance.check_close(y.double() / unit, exact / unit, plain.double() / unit, roundings=roundings)


@pytest.mark.parametrize(("scheme", "route"), CUDA_ROUTES, ids=lambda value: value)
def test_every_route_keeps_the_tolerance_policy(scheme, route):
    layer = layer_on_gpu(scheme, 272, 528)
    layer.route = route
    for m in (0, 1, 7, 16, 63, 1000):
        x = tokens(m, 528, layer.bias.dtype)
        check_layer(layer, x, run_or_skip(layer, x))


@pytest.mark.parametrize("route", ["slid", "slid:cusparselt:exact", "dense"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize(("n", "k", "pattern"), [(272, 528, "6:8"), (264, 508, "4:6"), (256, 512, "2:4")])
def test_later_calls_decide_nothing_anew_and_give_the_same(scheme, route, n, k, pattern):
    layer = layer_on_gpu(scheme, n, k, pattern)
    layer.route = route
    wide = tokens(600, k + 24, torch.bfloat16)
    for x in (wide[:100, 8 : k + 8], wide[:33, :k].contiguous(), wide[:1, 1 : k + 1], wide[:, :k]):
        first = run_or_skip(layer, x)
        check_layer(layer, x, first)
        tolerance.check_bitwise(layer(x), first)
        with torch.device("cuda"):  # somebody looks: through the ops
            tolerance.check_bitwise(layer(x), first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        captured.fill_(float("nan"))
        graph.replay()
        tolerance.check_bitwise(captured, first)
    with pytest.raises((ValueError, RuntimeError), match=r"[Bb]ias must"):
        layer._runner(wide[:100, 8 : k + 8], layer.bias[:-1])
    assert layer._runner.ready.calls


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize(("n", "k"), [(264, 508), (272, 528)])
def test_later_calls_are_the_first(scheme, n, k):
    if reason := cusparselt.unavailable("cuda"):
        pytest.skip(reason)
    layer, x = layer_on_gpu(scheme, n, k, bias=False), tokens(600, k, torch.bfloat16)
    run = Runner(Weights(layer.packed, layer.scheme, layer.weight_scale), route="slid")
    for part in (x[:50], x):
        first = run(part)
        bound = len(run.ready.calls)
        tolerance.check_bitwise(run(part), first)
        assert len(run.ready.calls) == bound > 0


@pytest.mark.parametrize("pattern", ["2:4", "4:6", "8:10", "14:16"])
@pytest.mark.parametrize(("scheme", "route"), [("int8", "dense"), ("int8", "slid:cusparselt:exact"), ("fp8", "slid"), ("bf16", "slid")])
def test_routes_take_ragged_layers_of_every_pattern(scheme, route, pattern):
    layer = layer_on_gpu(scheme, 264, 508, pattern, bias=False)
    layer.route = route
    x = tokens(33, 508, torch.bfloat16)
    check_layer(layer, x, run_or_skip(layer, x))


@pytest.mark.parametrize(("scheme", "route"), [*CUDA_ROUTES[:-1], ("int8", None), ("fp8", None), ("bf16", None)], ids=str)
def test_routes_compile_whole_and_replay_in_graphs_and_on_streams(scheme, route):
    layer = layer_on_gpu(scheme, 256, 512)
    layer.route = route
    wide = tokens(96, 600, layer.bias.dtype)
    x = wide[:, 40:552]
    eager = run_or_skip(layer, x)
    check_layer(layer, x, eager)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for part in (x, x[:40], x[:17]):
        check_layer(layer, part, compiled(part), compiled=route is None and layer.scheme.dynamic)
    static, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    layer(static)
    with torch.cuda.graph(graph):
        captured = layer(static)
    static.copy_(x)
    captured.fill_(float("nan"))
    graph.replay()
    tolerance.check_bitwise(captured, eager)
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [x.clone(), x.flip(0).contiguous()]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for stream, one in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(layer(one))
    torch.cuda.synchronize()
    for number, result in enumerate(results):
        tolerance.check_bitwise(result, eager if number % 2 == 0 else eager.flip(0))


def test_a_row_that_is_not_finite_spoils_only_itself():
    for scheme, route in CUDA_ROUTES:
        layer = layer_on_gpu(scheme, 256, 512)
        layer.route = route
        x = tokens(20, 512, layer.bias.dtype)
        x[3, 7], x[5, 9] = float("nan"), float("inf")
        try:
            y = layer(x)
        except UnsupportedError:
            continue
        bad = ~y.isfinite().all(-1)
        assert bad.nonzero().flatten().tolist() == [3, 5], (scheme, route)


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_memory_policies_hold_what_they_say(memory):
    layer = layer_on_gpu("int8", 1024, 1024)
    packed = layer.packed.nbytes
    placed = place(layer, "cuda", dtype=torch.bfloat16, memory=memory)
    x = tokens(5, 1024, torch.bfloat16)
    check_layer(layer, x, layer(x))
    assert layer.resident_bytes == placed.resident == (1024 * 1024 if memory == "fast" else 0)
    assert (placed.host, placed.packed) == ((packed, 0) if memory == "fast" else (0, packed))
    assert layer.weight_values.device.type == ("cpu" if memory == "fast" else "cuda")
    assert layer.weight.device.type == "cuda" and f"memory policy {memory}" in str(placed)
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other = layer_on_gpu("int8", 1024, 1024)
    other.load_state_dict(saved)
    tolerance.check_bitwise(other(x), layer(x))
    tolerance.check_bitwise(layer.cpu()(x.cpu()), other(x).cpu())


def test_capture_before_the_first_call_is_refused():
    layer = layer_on_gpu("int8", 64, 64)
    x = tokens(4, 64, torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(UnsupportedError, match="once before capturing"):
            layer(x)
        x.add_(1)


def test_tuning_measures_checks_and_resumes(tmp_path):
    layers = [LinearShape(512, 768, Pattern.parse(pattern), SCHEMES[scheme]) for pattern, scheme in (("6:8", "int8"), ("2:4", "fp8"))]
    path, seen = tmp_path / "plan.json", []
    plan = tune(layers, path, ms=(1, 16, 100), progress=lambda done, total, what: seen.append((done, total)))
    assert seen[-1] == (6, 6)
    for layer in layers:
        for m in (1, 16, 100):
            cell = plan.cells[key_of(layer.problem)][m]
            assert {"dense", "packed"} <= {route.layout for route in cell.times}
            assert all(t.p20 <= t.p50 <= t.p80 for t in cell.times.values())
            assert not any(reason.startswith("max error") for reason in cell.dropped.values()), cell.dropped
    seen.clear()
    assert tune(layers, path, ms=(1, 16, 100), progress=lambda done, total, what: seen.append((done, total))) == Plan.load(path)
    assert seen == [(0, 0)]
    use_plan(path)
    try:
        chosen = layer_on_gpu("int8", 512, 768, bias=False)
        x = tokens(100, 768, torch.bfloat16)
        y = chosen(x)
        assert chosen.routes == choice_of(Plan.load(path), layers[0].problem)[1]
        check_layer(chosen, x, y)
    finally:
        use_plan(None)
