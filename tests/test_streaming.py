"""Calibrated pruning block by block against the whole model and forward hooks, and the fitting of blocks to the dense model's output."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import models
import tiny
from slidesparse import Pattern, Recipe, convert, pruning, verify
from slidesparse.errors import UnsupportedError
from slidesparse.format import FP32, SCHEMES
from slidesparse.integrations.pruning import reconstruction, solving, streaming
from slidesparse.integrations.pruning.blocks import Blocks, Call
from slidesparse.pruning import Statistics
from tiny import SIX

pytestmark = pytest.mark.usefixtures("tiny_models")

TWO = Pattern.parse("2:4")

WIDE = {"hidden_size": 64, "intermediate_size": 104, "num_hidden_layers": 3}
BLOCKS = {
    "llama": "model.layers",
    "gemma3": "model.layers",
    "falcon": "transformer.h",
    "bloom": "transformer.h",
    "gpt-neox": "gpt_neox.layers",
}
SAMPLES = 21  # the last batch is smaller than the others


def inputs_of(model: nn.Module, layers: dict[str, nn.Linear], tokens: Tensor) -> dict[str, Tensor]:
    """What every layer is given ``[tokens, K]`` while the whole model runs on all samples at once."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def statistics_of(x: Tensor) -> Statistics:
    """Means over the tokens, in float64."""
    hessian = (x.double().t() @ x.double() / len(x)).float()
    return Statistics(hessian, hessian.diagonal().sqrt())


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_block_is_solved_behind_the_pruned_blocks_before_it(tmp_path, family, dtype):
    """The model as a whole, in float32, tells what each layer is given; blocks get the weights of the output once they are compared."""
    sizes = WIDE if family != "gemma3" else WIDE | {"num_hidden_layers": 4}
    dense, ids = tiny.build(tmp_path / "dense", family, dtype=dtype, **sizes), tiny.token_ids(tmp_path / "ids.npy", SAMPLES, 40)
    convert(dense, tmp_path / "out", tiny.recipe("sparsegpt", ids, samples=SAMPLES, length=40))
    tokens, pruned = torch.from_numpy(np.load(ids)), models.read(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    for index, block in enumerate(model.get_submodule(BLOCKS[family])):
        layers = {f"{BLOCKS[family]}.{index}.{name}": module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        given = inputs_of(model, layers, tokens)
        for name, layer in layers.items():
            want = pruning.sparsegpt(layer.weight.detach(), SIX, statistics_of(given[name])).to(dtype).float()
            got = pruned[f"{name}.weight"]
            assert got.dtype == dtype
            # A choice between two weights that matter alike may turn on a sum's last bits; then the whole row differs.
            rows = ((got == 0) == (want == 0)).all(dim=1)
            assert rows.float().mean() > 0.9, f"{name}: {int((~rows).sum())} of {len(rows)} rows keep other weights"
            distance = (got.float()[rows] - want[rows]).norm() / want[rows].norm()
            assert distance < (2**-9 if dtype == torch.bfloat16 else 1e-4), f"{name}: {distance:.2e}"
        for name, layer in layers.items():
            layer.weight.data = pruned[f"{name}.weight"].float()


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_8_bit_weights_are_rounded_with_the_output_in_view(tmp_path, scheme):
    """In a float32 model, whose pruned weights are written as they are: both ways start from the same numbers and have the same scales."""
    dense, ids = tiny.build(tmp_path / "dense", dtype=torch.float32), tiny.token_ids(tmp_path / "ids.npy", SAMPLES)
    report = convert(dense, tmp_path / "direct", tiny.recipe("admm", ids, samples=SAMPLES, scheme=scheme)).pruning
    convert(dense, tmp_path / "masked", tiny.recipe("admm", ids, samples=SAMPLES))
    convert(tmp_path / "masked", tmp_path / "nearest", Recipe(SIX, scheme=scheme, form="dense"))
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    layers = {name: model.get_submodule(name) for name in report.blocks[0]["layers"]}
    stored = {run: models.read(tmp_path / run) for run in ("direct", "nearest")}
    for name, given in inputs_of(model, layers, torch.from_numpy(np.load(ids))).items():
        weight = layers[name].weight.detach()
        assert torch.equal(*(tensors[f"{name}.weight_scale"] for tensors in stored.values()))
        meant = {run: tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"] for run, tensors in stored.items()}
        errors = {run: pruning.layer_error(weight, each, statistics_of(given)) for run, each in meant.items()}
        assert errors["direct"] < errors["nearest"] and errors["direct"] == pytest.approx(report.layers[name]["error"], rel=1e-3), name


def test_statistics_are_taken_once_for_a_block_while_all_its_layers_are_dense(tmp_path, monkeypatch):
    dense, ids = tiny.build(tmp_path / "dense", num_hidden_layers=3), tiny.token_ids(tmp_path / "ids.npy")
    before, taken = models.read(dense), []
    gather = streaming.gather

    def look(tasks, passes):
        for task in tasks:
            assert torch.equal(task.module.weight, before[f"{task.name}.weight"].float())
        taken.append([task.name.split(".")[2] for task in tasks])
        return gather(tasks, passes)

    monkeypatch.setattr(streaming, "gather", look)
    convert(dense, tmp_path / "out", tiny.recipe("wanda", ids))
    assert taken == [[str(index)] * 7 for index in range(3)]


def test_layers_with_the_same_input_share_its_statistics(tmp_path):
    dense = tiny.build(tmp_path / "dense", "llama", dtype=torch.float32)
    block = transformers.AutoModelForCausalLM.from_pretrained(dense).model.layers[0]
    tasks = [solving.Task(name, module, SIX, FP32) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    x, half = torch.randn(2, 8, 32), torch.zeros(1, 8, 8)
    found = solving.gather(tasks, [lambda x=x: block(x, position_embeddings=(half.repeat(1, 1, 2), half.repeat(1, 1, 2)))] * 2)
    shared = {id(statistics) for statistics in found.values()}
    assert len(found) == 7 and len(shared) == 4, "q, k, v and gate, up have one input each"
    assert len({id(found[f"self_attn.{part}_proj"]) for part in "qkv"}) == 1


def test_hidden_states_are_let_go_behind_every_block(tmp_path, monkeypatch):
    dense, ids = tiny.build(tmp_path / "dense"), tiny.token_ids(tmp_path / "ids.npy")
    entered: list[weakref.ref] = []
    enter, step, alive = Blocks.enter, streaming._Stream.step, []

    def note(self, tokens, size):
        hidden, calls = enter(self, tokens, size)
        if size > 1 or len(tokens) > 1:
            entered.extend(weakref.ref(batch) for batch in hidden)
        return hidden, calls

    def count(self, index):
        gc.collect()
        alive.append(sum(batch() is not None for batch in entered))
        return step(self, index)

    monkeypatch.setattr(Blocks, "enter", note)
    monkeypatch.setattr(streaming._Stream, "step", count)
    convert(dense, tmp_path / "out", tiny.recipe("wanda", ids))
    assert alive == [12, 0]


@pytest.mark.parametrize("refused", [True, False])
def test_hidden_states_lie_in_ordinary_memory_where_pinning_fails(monkeypatch, refused):
    asked, plain = [], torch.empty_like

    def empty(batch: Tensor, *, device: torch.device, pin_memory: bool = False) -> Tensor:
        asked.append(pin_memory)
        if pin_memory and refused:
            raise RuntimeError("CUDA error: out of memory")
        return plain(batch, device=device)

    monkeypatch.setattr(torch, "empty_like", empty)
    stream = object.__new__(streaming._Stream)
    stream.device, stream.home = torch.device("cuda", 0), torch.device("cpu")
    batch = torch.randn(2, 3, 4)
    kept = stream._kept(batch)
    assert asked == ([True, False] if refused else [True])
    assert torch.equal(kept, batch) and kept.data_ptr() != batch.data_ptr()


# ---------------------------------------------------------------------------------------------- models that cannot be followed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Tensor:
        return hidden_states + self.linear(hidden_states)


class Model(nn.Module):
    """Three blocks; ``kind`` says what is odd about the way they are called."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed, self.blocks = kind, nn.Embedding(32, 16), nn.ModuleList(Block() for _ in range(3))
        if kind == "shares":
            self.blocks[2].linear = self.blocks[0].linear

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = first = self.embed(input_ids)
        if self.kind == "shape":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nand more")
        for number, block in enumerate(self.blocks):
            if self.kind == "skips" and number == 2:
                continue
            if self.kind == "scales":
                hidden = hidden * 0.5
            extra = {"tokens": self.embed(input_ids), "states": hidden if number else first, "plain": torch.ones(1)}.get(self.kind)
            hidden = block(first if self.kind == "first" and number else hidden, extra)
        return hidden


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("skips", "2 of 3 blocks of blocks ran"),
        ("scales", "block 1 of blocks gets other hidden states"),
        ("first", "block 1 of blocks gets other hidden states"),
        ("tokens", "block 0 of blocks gets more than hidden states from the tokens"),
        ("states", "block 1 of blocks gets more than hidden states"),
        ("shares", "blocks 0 and 2 of blocks share linear.weight"),
        ("shape", r"does not run on 16 tokens \(mat1 and mat2 shapes cannot be multiplied\)"),
    ],
)
def test_a_model_whose_blocks_cannot_run_one_by_one_is_refused(kind, told):
    with pytest.raises(UnsupportedError, match=rf"^Model: .*{told}.*--method magnitude$"):
        Blocks.of(Model(kind)).check(torch.arange(20).unsqueeze(0))
    Blocks.of(Model("plain")).check(torch.arange(20).unsqueeze(0))


# ---------------------------------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_reconstruction_keeps_masks_and_never_makes_a_block_worse(tmp_path, scheme):
    """Half of the weights gone leave more to gain than what chance does to the samples held out."""
    dense, ids = tiny.build(tmp_path / "dense"), tiny.token_ids(tmp_path / "ids.npy", samples=40, words=27)
    reports, outputs = {}, {}
    for name, steps in (("plain", 0), ("fitted", 60), ("again", 60)):
        recipe = tiny.recipe("auto", ids, samples=40, pattern=TWO, scheme=scheme, reconstruction_steps=steps)
        reports[name] = convert(dense, tmp_path / name, recipe).pruning
        outputs[name] = models.read(tmp_path / name)
    assert reports["fitted"] == reports["again"] and reports["fitted"].method == "admm + 60 steps of reconstruction"
    assert all(torch.equal(outputs["fitted"][name], outputs["again"][name]) for name in outputs["fitted"])
    assert reports["plain"].method == "admm" and "error_before" not in reports["plain"].blocks[0]
    first, last = reports["fitted"].blocks
    assert 0 < first["error_after"] < first["error_before"] and 0 < last["divergence_after"] <= last["divergence_before"]
    # The first block has the same inputs in both runs: masks agree, weights do not.
    for name in reports["fitted"].blocks[0]["layers"]:
        plain, fitted = (outputs[run][f"{name}.weight"].float() for run in ("plain", "fitted"))
        assert not ((fitted != 0) & (plain == 0)).any() and not torch.equal(fitted, plain)
    assert verify(tmp_path / "fitted").ok
    assert json.loads((tmp_path / "fitted/pruning_report.json").read_text())["blocks"] == reports["fitted"].blocks


@pytest.mark.parametrize("steps", [1, 10])
def test_a_few_steps_are_enough(tmp_path, steps):
    """Of ten steps, the tenth in which step sizes rise has no length."""
    dense, ids = tiny.build(tmp_path / "dense"), tiny.token_ids(tmp_path / "ids.npy", samples=16)
    recipe = tiny.recipe("auto", ids, samples=16, reconstruction_steps=steps)
    assert convert(dense, tmp_path / "out", recipe).pruning.method == f"admm + {steps} steps of reconstruction"


@pytest.mark.needs_gpu
@pytest.mark.parametrize("scheme", [None, "int8", "fp8"])
def test_a_gpu_solves_what_a_cpu_solves(tmp_path, scheme):
    dense, ids = tiny.build(tmp_path / "dense"), tiny.token_ids(tmp_path / "ids.npy", samples=40)
    recipe = tiny.recipe("auto", ids, samples=40, scheme=scheme, reconstruction_steps=60)
    found = {device: convert(dense, tmp_path / device, recipe, device=device).pruning for device in ("cpu", "cuda")}
    for name, layer in found["cuda"].layers.items():
        assert layer["error"] == pytest.approx(found["cpu"].layers[name]["error"], rel=0.1), name
    first, last = found["cuda"].blocks
    assert first["error_after"] <= first["error_before"] and last["divergence_after"] <= last["divergence_before"]
    assert verify(tmp_path / "cuda").ok


def hidden_states(path, tokens: Tensor) -> list[Tensor]:
    """What goes into the first block of a llama and what comes out of every block, all samples in one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return found


def test_reconstruction_is_given_pruned_inputs_and_the_dense_models_outputs(tmp_path, monkeypatch):
    sizes = {"dtype": torch.float32, "num_hidden_layers": 5}
    dense, ids = tiny.build(tmp_path / "dense", **sizes), tiny.token_ids(tmp_path / "ids.npy", SAMPLES)
    given: list[list[Tensor]] = []

    def look(tasks, solutions, batches, **options):
        behind = [depth.targets for depth in (batches.here, *batches.ahead)]
        given.append([torch.cat(stream) for stream in (batches.inputs, batches.dense, *behind)])
        return reconstruction.Outcome(1.0, 1.0, dict(solutions))

    monkeypatch.setattr(streaming, "reconstruct", look)
    convert(dense, tmp_path / "out", tiny.recipe("auto", ids, samples=SAMPLES, reconstruction_steps=1))
    tokens = torch.from_numpy(np.load(ids))
    pruned, whole = hidden_states(tmp_path / "out", tokens), hidden_states(dense, tokens)
    for index, (inputs, *depths) in enumerate(given):
        torch.testing.assert_close(inputs, pruned[index], rtol=1e-3, atol=1e-4)
        for depth, wanted in zip(depths, whole[index : index + 5], strict=True):  # in front of the block, behind it and behind three more
            torch.testing.assert_close(depth, wanted, rtol=1e-3, atol=1e-4)
    assert len(given) == 5 and not torch.allclose(pruned[2], whole[2], rtol=1e-2, atol=1e-2)


def test_only_pruned_weights_get_gradients(tmp_path, monkeypatch):
    dense, ids = tiny.build(tmp_path / "dense", "qwen2-moe"), tiny.token_ids(tmp_path / "ids.npy")
    fit, blocks = streaming.reconstruct, []

    def look(tasks, solutions, batches, **options):
        outcome = fit(tasks, solutions, batches, **options)
        depths = [depth.block for depth in (batches.here, *batches.ahead)]
        blocks.append([name for block in depths for name, parameter in block.named_parameters() if parameter.grad is not None])
        return outcome

    monkeypatch.setattr(streaming, "reconstruct", look)
    convert(dense, tmp_path / "out", tiny.recipe("auto", ids, reconstruction_steps=2))
    assert blocks == [[], []]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_loud_tokens_fit_a_block_in_16_bits(dtype):
    """Each token's gradient is too small for float16; on a GPU blocks run in the model's own type."""
    block = Block().to(dtype).requires_grad_(False)
    mixed = torch.randn(3, 16)  # inputs of low rank: the weights that stay can do what the others did
    inputs = [(8000 * nn.functional.normalize(torch.randn(4, 512, 3) @ mixed, dim=-1)).to(dtype) for _ in range(5)]
    tasks = [solving.Task("linear", block.linear, SIX, SCHEMES["fp16" if dtype == torch.float16 else "bf16"])]
    with torch.no_grad():
        targets = [block(x) for x in inputs]
        statistics = solving.gather(tasks, [lambda x=x: block(x) for x in inputs])
        solutions = solving.solve_layers(tasks, statistics, "wanda", lambda name: None)
    batches = reconstruction.Batches(inputs, inputs, reconstruction.Depth(block, [Call((), {}, None)] * 5, targets))
    outcome = reconstruction.reconstruct(tasks, solutions, batches, steps=100, seed=0, device=torch.device("cpu"), notice=lambda step: None)
    assert outcome.after < 0.9 * outcome.before


def test_training_lies_between_the_pruned_and_the_dense_inputs():
    pruned, dense = [torch.zeros(2, 64, 3)], [torch.ones(2, 64, 3)]
    mixed = reconstruction.Batches(pruned, dense, None).mixed(0, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.equal(mixed, mixed[..., :1].expand_as(mixed)) and 0 <= mixed.min() < 0.2 and 0.8 < mixed.max() <= 1
    assert len(mixed[..., 0].unique()) > 100


def test_one_sample_is_too_few_to_fit_a_block_and_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "reconstruct", None)  # not to be called
    dense, ids = tiny.build(tmp_path / "dense"), tiny.token_ids(tmp_path / "ids.npy", 1, 60)
    report = convert(dense, tmp_path / "out", tiny.recipe("auto", ids, samples=1, length=60, reconstruction_steps=20))
    assert report.pruning.method == "admm, without reconstruction: a single sample leaves none to judge by"
    convert(dense, tmp_path / "plain", tiny.recipe("admm", ids, samples=1, length=60))
    one, other = models.read(tmp_path / "out"), models.read(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_result_that_is_worse_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction, "_RATE", 1e3)
    dense, ids = tiny.build(tmp_path / "dense"), tiny.token_ids(tmp_path / "ids.npy")
    report = convert(dense, tmp_path / "out", tiny.recipe("auto", ids, reconstruction_steps=4))
    first, last = report.pruning.blocks
    assert first["error_after"] == first["error_before"] and last["divergence_after"] == last["divergence_before"]
    convert(dense, tmp_path / "plain", tiny.recipe("admm", ids))
    one, other = models.read(tmp_path / "out"), models.read(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in one)
