"""Private names of other libraries: they stand in ``compat`` only, and what is to run without them does."""

from __future__ import annotations

import ast
import csv
import importlib.util
import logging
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import models
from slidesparse import doctor
from slidesparse.compat import torch as torch_names
from slidesparse.compat import versions
from slidesparse.compat.versions import TESTED, lacks, numbers, untested
from slidesparse.errors import UnsupportedError
from slidesparse.gemm.kernels import dense

ROOT = Path(__file__).resolve().parent.parent
COMPAT = ROOT / "src" / "slidesparse" / "compat"
FILES = [path for path in sorted((ROOT / "src").rglob("*.py")) if path.parent != COMPAT]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

LIBRARIES = ("torch", "triton", "transformers", "vllm", "nvmath")
PUBLIC = {"triton": {"triton", "triton.language"}, "transformers": {"transformers"}, "vllm": {"vllm"}, "nvmath": set()}
"""Modules whose names may be imported anywhere; of torch, all without an underscore but those below."""
UNSTABLE = ("torch.fx.experimental", "torch.compiler.config")
PROTOCOL = {
    "_apply", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_load_from_state_dict", "_parameters",  # of nn.Module, for subclasses
    "_version",  # of tensors, what torch's notes on in-place changes name
    "_fields", "_replace",  # of named tuples, by Python's documents
}  # fmt: skip
"""Names with an underscore that are meant to be used."""
TOLD = {
    "all_tied_weights_keys", "arg_names", "forward_native", "inductor_compile_config", "packed_metadata", "pass_key", "torch_op",
}  # fmt: skip
"""Names without one that only their library's source tells."""


def chain(node: ast.AST) -> str:
    """``a.b.c`` of such an expression; empty of others."""
    text = ast.unparse(node)
    return text if all(part.isidentifier() for part in text.split(".")) else ""


@cache
def own_names() -> set[str]:
    """Names with an underscore that the package gives itself."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and chain(node.value) in ("self", "cls"):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name | ast.Attribute):
                found.add(chain(node.target).rpartition(".")[2])
            elif isinstance(node, ast.Assign) and chain(node.targets[0]) == "__slots__":
                found |= {one.value for one in node.value.elts}
    return {name for name in found if name.startswith("_")}


def is_private(module: str) -> bool:
    root = module.partition(".")[0]
    if root not in LIBRARIES:
        return False
    if root != "torch":
        return module not in PUBLIC[root]
    return module.startswith(UNSTABLE) or any(part.startswith("_") for part in module.split("."))


def is_foreign(name: str, own: set[str]) -> bool:
    """Whether another library's name has an underscore in front that keeps others away."""
    return name.startswith("_") and not name.startswith("__") and name not in own | PROTOCOL


def private_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """What a file uses of other libraries that they do not promise to keep, with the line."""
    for node in ast.walk(tree):
        used: list[str] = []
        if isinstance(node, ast.Import):
            used = [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [alias.name for alias in node.names]
            outside = node.module.partition(".")[0] in LIBRARIES
            used = [f"{node.module}.{name}" for name in names if is_private(node.module) or (outside and name.startswith("_"))]
        elif isinstance(node, ast.Attribute):
            unstable = chain(node).startswith(UNSTABLE)
            used = [ast.unparse(node)] if unstable or node.attr in TOLD or is_foreign(node.attr, own) else []
        elif isinstance(node, ast.Call) and chain(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            texts = [one.value for one in ast.walk(node.args[1]) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            used = [
                text
                for text in texts
                if text in TOLD or (text.startswith("_") and not text.startswith("__") and text not in own | PROTOCOL)
            ]
        yield from (f"{getattr(node, 'lineno', 0)}: {name}" for name in used)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_private_names_of_other_libraries_stand_in_compat_only(path: Path) -> None:
    assert not list(private_names(TREES[path], own_names()))


@pytest.mark.parametrize(
    "line",
    [
        "import torch._inductor",
        "import vllm.config",
        "from torch._C import x",
        "from torch.overrides import _get_current_function_mode_stack",
        "from torch.fx.experimental.symbolic_shapes import statically_known_true",
        "from triton.runtime.jit import JITFunction",
        "from transformers.core_model_loading import WeightConverter",
        "from vllm.config import VllmConfig",
        "torch._scaled_mm(a, b)",
        "torch.ops._C.cutlass_scaled_mm",
        "torch._dynamo.reset()",
        "getattr(torch._C, name)",
        "getattr(torch.C, '_cuda_getDevice', None)",
        "getattr(model, f'_keys_to_ignore_on_load_{kind}')",
        "model.all_tied_weights_keys",
        "module._is_hf_initialized = True",
        "compiled.packed_metadata",
        "parameter._assert_and_load(x)",
    ],
)
def test_a_private_name_elsewhere_is_found(line: str) -> None:
    assert list(private_names(ast.parse(line), own_names()))


def anew(name: str) -> ModuleType:
    """A file of compat, run again: its names are looked up when it is imported."""
    spec = importlib.util.spec_from_file_location(f"slidesparse.compat._{name}_again", COMPAT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without(monkeypatch: pytest.MonkeyPatch, home: object, name: str, file: str = "torch") -> ModuleType:
    """The file, run while a name is not there."""
    with monkeypatch.context() as patch:
        patch.delattr(home, name)
        return anew(file)


def test_without_a_name_that_tells_who_watches_ops_go_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch_names.watched() and not anew("torch").watched()
    for home, name in (
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_len_torch_function_stack"),
        (torch._C, "_get_tracing_state"),
        (torch._C._functorch, "peek_interpreter_stack"),
        (torch.overrides, "_get_current_function_mode_stack"),
    ):
        assert without(monkeypatch, home, name).watched(), name


def test_tracing_is_still_known_by_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    state, seen = without(monkeypatch, torch._C, "_get_tracing_state").tracing_state, []
    assert state() is None
    torch.jit.trace(lambda x: (seen.append(state()), x + 1)[1], torch.ones(2), check_trace=False)
    assert seen and all(seen)


def test_device_and_stream_are_numbers_with_and_without_the_quick_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=70 + device))
    # A CPU build of torch has neither, and then this is what runs here, too.
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream"):
        monkeypatch.delattr(torch._C, name, raising=False)
    slow = anew("torch")
    assert slow.current_device() == 3 and slow.current_stream(2) == 72
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 5, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 90 + device, raising=False)
    quick = anew("torch")
    assert quick.current_device() == 5 and quick.current_stream(2) == 92


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.needs_gpu)])
@pytest.mark.parametrize("rows", [False, True], ids=["tensor-wise", "row-wise"])
def test_the_public_scaled_product_is_the_private_one(
    rows: bool, device: str, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    public = without(monkeypatch, torch, "_scaled_mm").scaled_mm
    assert public is not torch_names.scaled_mm
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    q, weight = (torch.randn(n, 64, generator=rng).to(device, torch.float8_e4m3fn) for n in (32, 48))
    # Powers of two, which the two may multiply in any order.
    shapes = ((32, 1), (1, 48)) if rows else ((), ())
    scales = [torch.randint(-8, 9, shape, generator=rng).float().exp2().to(device) for shape in shapes]
    if device == "cpu":
        try:
            public(q, weight.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
        except NotImplementedError:
            pytest.skip("the public product of this torch needs CUDA")
    for bias in (None, torch.randn(48, generator=rng).to(device, torch.bfloat16)):
        settings = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        given = (q, weight.t(), *scales, bias)
        assert torch.equal(public(*given, **settings), torch_names.scaled_mm(*given, **settings))


def test_without_the_integer_product_sums_stay_exact_and_its_kernel_says_so(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    bare = without(monkeypatch, torch, "_int_mm")
    monkeypatch.setattr(dense, "HAS_INT_MM", bare.HAS_INT_MM)
    monkeypatch.setattr(dense, "int_mm", bare.int_mm)
    q, weight = (torch.randint(-128, 128, (n, 2080), generator=rng).to(torch.int8) for n in (5, 7))
    dense._int_mm_is_exact.cache_clear()
    try:
        assert torch.equal(dense.int_matmul(q, weight).long(), q.long() @ weight.long().t())
        assert not dense._int_mm_is_exact("cpu") and not dense._int_mm_takes(weight.repeat(8, 1), weight.repeat(8, 1))
    finally:
        dense._int_mm_is_exact.cache_clear()
    problem = SimpleNamespace(scheme=SimpleNamespace(name="int8"), cuda=True, n=64, k=64)
    assert "has no _int_mm" in dense._not_cublaslt(problem)


def test_a_missing_matcher_of_graphs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import pattern_matcher

    assert torch_names.graph_patterns().PatternMatcherPass is pattern_matcher.PatternMatcherPass
    monkeypatch.delattr(pattern_matcher, "register_replacement")
    with pytest.raises(UnsupportedError, match=rf"^torch {torch.__version__.split('+')[0]}.* has no .*register_replacement.*install torch"):
        torch_names.graph_patterns.__wrapped__()


def test_a_missing_way_past_subclasses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch_names.without_subclasses():
        pass
    monkeypatch.setattr(torch_names, "found", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"DisableTorchFunctionSubclass.*install torch"):
        torch_names.without_subclasses()


def test_a_triton_that_launches_otherwise_is_left_to_launch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    jit = pytest.importorskip("triton.runtime.jit", reason="triton is not installed: pip install triton")
    from slidesparse.compat import triton as names
    from slidesparse.ops import launch
    from test_launch import CONSTANTS, Kernel

    assert names.launches_as_known.__wrapped__()

    def run(self, *bound, kernel, grid_0, grid_1, grid_2, stream, hook):
        kernel.run(kernel.function, grid_0, grid_1, grid_2, stream, kernel.packed_metadata, None, hook, hook, *bound)

    monkeypatch.setattr(jit.JITFunction, "run", run)
    with caplog.at_level(logging.WARNING):
        assert not names.launches_as_known.__wrapped__()
    assert "results are the same" in caplog.text
    monkeypatch.setattr(names, "launches_as_known", lambda: False)
    kernel, x = Kernel(), torch.zeros(64, dtype=torch.int8)
    call = launch.Launch(kernel, (5,), (48, 1), CONSTANTS)
    for _ in range(3):
        call(x, None)
    assert len(kernel.compiled) == 3 and not kernel.direct


def test_a_name_that_triton_lacks_is_told_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = pytest.importorskip("triton.language.extra.cuda", reason="triton is not installed: pip install triton")
    with pytest.raises(ImportError, match=r"what triton [0-9.]+ does not have .*gdc_wait.*install triton"):
        without(monkeypatch, cuda, "gdc_wait", "triton")


def test_a_name_that_transformers_lacks_is_told_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading, modeling_gguf_pytorch_utils
    from transformers.quantizers import HfQuantizer

    from slidesparse.compat import transformers as names

    with pytest.raises(UnsupportedError, match=r"what transformers [0-9.]+ does not have .*rename_source_key.*install transformers"):
        without(monkeypatch, core_model_loading, "rename_source_key", "transformers")
    with monkeypatch.context() as patch:
        patch.delattr(modeling_gguf_pytorch_utils, "TensorProcessor")
        with pytest.raises(UnsupportedError, match=r"what transformers [0-9.]+ does not have .*TensorProcessor"):
            names.gguf_tables()
    for hook in names.HOOKS:
        with monkeypatch.context() as patch:
            patch.delattr(HfQuantizer, hook)
            with pytest.raises(UnsupportedError, match=rf"has no HfQuantizer.{hook}"):
                names.register_method("anything", object, object)


def test_transformers_that_is_not_there_is_named_with_a_way_out(tmp_path: Path) -> None:
    models.write(tmp_path / "dense")
    code = "import sys; sys.modules['transformers'] = None; from slidesparse.cli import main; main()"
    for words in (("generate", tmp_path / "dense", "Hello"), ("eval", tmp_path / "dense", "--text", __file__)):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.stderr == "error: transformers is not installed: pip install 'transformers>=5.6'\n" and done.returncode == 1


def test_a_name_that_vllm_lacks_is_told_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pytest.importorskip("vllm.model_executor.layers.linear", reason="vllm is not installed: pip install 'slidesparse[vllm]'")
    with pytest.raises(UnsupportedError, match=r"what vllm .* does not have .*RowParallelLinear.*install vllm"):
        without(monkeypatch, linear, "RowParallelLinear", "vllm")


def test_numbers_are_those_of_nvmaths_enumerations_and_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from slidesparse.compat import nvmath

    places = [f"CudaDataType.{name}" for name in nvmath._TYPES.values()] + list(nvmath._PLACES.values())
    made: dict[str, ModuleType] = {}
    for number, place in enumerate(places, start=100):
        *module, enumeration, member = place.split(".")
        name = ".".join(("nvmath", *module))
        home = made.setdefault(name, ModuleType(name))
        if not hasattr(home, enumeration):
            setattr(home, enumeration, SimpleNamespace())
        setattr(getattr(home, enumeration), member, number)
    for name in ("nvmath", "nvmath.bindings"):
        made.setdefault(name, ModuleType(name)).__path__ = []
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = nvmath.numbers.__wrapped__()
    assert [*found.types.values(), *found[1:]] == list(range(100, 100 + len(places))) and found.types[torch.int8] == 102
    del made["nvmath.bindings.cusparseLt"].MatmulAlgAttribute.SPLIT_K
    with pytest.raises(UnsupportedError, match=r"has no bindings.cusparseLt.MatmulAlgAttribute.SPLIT_K"):
        nvmath.numbers.__wrapped__()


def test_versions_newer_than_the_newest_tested_are_told_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers("2.11.0+cu130") == (2, 11) and numbers("dev") == (0, 0) < numbers("0.26rc1")
    for library, tested in TESTED.items():
        major, minor = numbers(tested.newest)
        assert numbers(tested.oldest) <= (major, minor)
        assert untested(library, tested.oldest) is None and untested(library, f"{tested.newest}.9+cpu") is None
        for version in (f"{major}.{minor + 1}.0", f"{major + 1}.0"):
            assert tested.newest in untested(library, version)
    assert untested("vllm", "0.33.0"), "its Python part was tested, without a GPU"
    assert untested("anything", "99.0") is None
    assert "of unknown version has no name" in lacks("vllm", "name") or "vllm" in lacks("vllm", "name")
    monkeypatch.setattr(torch, "__version__", "99.1.0")
    monkeypatch.setattr(doctor.metadata, "version", lambda package: "99.0")
    found = {one.what: one for one in doctor.diagnose()}
    for library in ("torch", "triton", "transformers", "vllm"):
        assert not found[library].ok and f"newer than {TESTED[library].newest}" in found[library].means


def test_floors_are_the_oldest_versions_tested_and_torch_has_no_ceiling() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    floors = {requirement for group in (project["dependencies"], *extras.values()) for requirement in group}
    for library in ("torch", "transformers", "vllm", "nvmath-python"):
        assert [one for one in floors if one.startswith(f"{library}>")] == [f"{library}>={TESTED[library].oldest}"]


def test_the_oldest_and_the_newest_version_have_a_run_without_failures() -> None:
    with (ROOT / "tests" / "compat_runs.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["failed"] == "0" and int(row["passed"]) > 50]
    for library in ("transformers", "vllm"):
        ran = {numbers(row[library]) for row in rows}
        assert {numbers(TESTED[library].oldest), numbers(TESTED[library].newest)} <= ran, library


def test_a_vllm_that_is_too_old_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"0\.25\.1"):
        versions.check_vllm("0.25.1")
