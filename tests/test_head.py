"""Logits behind a model's last block, and the KL divergence by which reconstruction judges that block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from slidesparse import convert
from slidesparse.integrations.pruning import head as heads
from slidesparse.integrations.pruning import streaming
from slidesparse.integrations.pruning.blocks import Blocks, Call
from slidesparse.integrations.pruning.reconstruction import Depth

pytestmark = pytest.mark.usefixtures("tiny_models")

SCALED = {
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 3.0, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
}
"""Families that scale, or bend, their logits or embeddings."""
OTHERS = ("llama", "qwen2", "gemma3", "phi", "gpt-neox", "falcon", "bloom", "opt", "qwen2-moe", "mixtral")


def built(monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in memory, ready to run."""
    monkeypatch.setattr(tiny, "FAMILIES", tiny.FAMILIES | SCALED)
    model = transformers.AutoModelForCausalLM.from_config(tiny.config(family), dtype=dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2 + (1 if parameter.dim() == 1 else 0))
    return model


def behind(model: Any, blocks: Blocks, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states behind the last block, and the model's logits."""
    seen: list[Tensor] = []
    handle = blocks.modules[-1].register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    handle.remove()
    return seen[0], logits


def checked(model: Any) -> Blocks:
    blocks = Blocks.of(model)
    blocks.check(torch.arange(3, 27).unsqueeze(0))
    return blocks


@pytest.mark.parametrize("family", [*OTHERS, *SCALED])
@torch.no_grad()
def test_logits_are_the_models_own(monkeypatch, family):
    model = built(monkeypatch, family)
    blocks = checked(model)
    hidden, logits = behind(model, blocks, torch.randint(3, tiny.WORDS, (2, 20)))
    assert blocks.head is not None
    torch.testing.assert_close(blocks.head(hidden), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(blocks.head(hidden[:, 7:9]), logits[:, 7:9], rtol=1e-4, atol=1e-5)
    assert all("forward" not in block.__dict__ for block in blocks.modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen2", *SCALED])
def test_divergence_in_pieces_is_that_of_all_logits(monkeypatch, family, dtype):
    monkeypatch.setattr(heads, "PIECE", 6)
    with torch.no_grad():
        model = built(monkeypatch, family, dtype)
    blocks = checked(model)
    hidden, logits = behind(model, blocks, torch.randint(3, tiny.WORDS, (3, 14)))
    own = (hidden + torch.randn_like(hidden)).requires_grad_()
    found = blocks.head.divergence(own, hidden)
    (gradient,) = torch.autograd.grad(found, own)
    direct = nn.functional.kl_div(
        blocks.head(own).float().log_softmax(-1), logits.float().log_softmax(-1), reduction="sum", log_target=True
    )
    (wanted,) = torch.autograd.grad(direct / 42, own)
    share = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    assert found.item() == pytest.approx(direct.item() / 42, rel=share) and found.item() > 1e-4
    assert (gradient - wanted).float().norm() <= share * wanted.float().norm()


def test_logits_of_a_few_tokens_are_there_at_a_time(monkeypatch):
    monkeypatch.setattr(heads, "PIECE", 6)
    with torch.no_grad():
        model = built(monkeypatch, "llama")
    blocks, rows, kept = checked(model), [], []
    hidden = torch.randn(3, 14, 32, requires_grad=True)
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[0] * output.shape[1]))

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        blocks.head.divergence(hidden, torch.randn(3, 14, 32))
    handle.remove()
    assert max(rows) == 6 and sum(rows) == 2 * 3 * 14
    assert not [shape for shape in kept if tiny.WORDS in shape], "no logits wait for the backward pass"


@pytest.mark.parametrize("tied", [False, True])
def test_modules_that_run_move_and_no_others(monkeypatch, tied):
    with torch.no_grad():
        model = built(monkeypatch, "llama")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.vision = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    checked(model).head.to(torch.device("meta"))
    stay = (model.model.embed_tokens, model.model.layers[1].mlp.up_proj, *model.vision)
    assert [module.weight.device.type for module in (*stay, model.model.norm, model.lm_head)] == ["cpu"] * 4 + ["meta"] * 2
    assert model.vision[1].running_mean.device.type == "cpu" and model.model.rotary_emb.inv_freq.device.type == "meta"


def test_a_forward_that_a_block_has_for_itself_comes_back(monkeypatch):
    """Hooks and kernels may be set on an instance."""
    with torch.no_grad():
        model = built(monkeypatch, "llama")
    first, second = Blocks.of(model).modules
    plain, ran = first.forward, []

    def own(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return plain(*args, **kwargs)

    first.forward = own
    blocks = checked(model)
    assert blocks.head is not None and len(ran) == 1, "the model runs as a whole once"
    assert vars(first)["forward"] is own and "forward" not in vars(second)


@pytest.mark.parametrize(
    "error", [RuntimeError("Expected all tensors on one device\nMore."), torch.OutOfMemoryError("Expected all tensors")]
)
@pytest.mark.parametrize("moves", [True, False])
def test_a_head_that_does_not_run_on_the_device_gives_way_to_hidden_states(tmp_path, monkeypatch, error, moves):
    dense, ids = tiny.build(tmp_path / "dense"), tiny.token_ids(tmp_path / "ids.npy")
    move, told = heads.Head.to, []

    def fail(*args: Any) -> None:
        raise error

    def to(self: heads.Head, device: torch.device) -> heads.Head:
        if not moves and not told:
            told.append("raised while it moves")
            raise error
        self.model.lm_head.forward = fail
        return move(self, device)

    monkeypatch.setattr(heads.Head, "to", to)
    recipe = tiny.recipe("auto", ids, reconstruction_steps=2)
    report = convert(dense, tmp_path / "out", recipe, progress=lambda done, total, what: told.append(what))
    first, last = report.pruning.blocks
    assert "judged_by_hidden_states" not in first and "divergence_after" not in last and last["error_after"] > 0
    assert last["judged_by_hidden_states"].startswith("no logits on cpu (Expected all tensors")
    assert sum("judged by hidden states" in what for what in told) == 1


def test_the_head_stays_where_the_last_block_is_solved_already(tmp_path, monkeypatch):
    dense, ids = tiny.build(tmp_path / "dense"), tiny.token_ids(tmp_path / "ids.npy")
    recipe, step, move, moved = tiny.recipe("auto", ids, reconstruction_steps=2), streaming._Stream.step, heads.Head.to, []

    def to(self: heads.Head, device: torch.device) -> heads.Head:
        moved.append(device)
        return move(self, device)

    def stop(self: Any, index: int) -> Any:
        report = step(self, index)
        if index == 1:
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(heads.Head, "to", to)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(streaming._Stream, "step", stop)
        convert(dense, tmp_path / "out", recipe)
    assert len(moved) == 1
    last = convert(dense, tmp_path / "out", recipe).pruning.blocks[1]
    assert len(moved) == 1 and "divergence_after" in last


def test_a_model_without_logits_of_its_own_is_judged_by_hidden_states(tmp_path):
    """OPT's embeddings may be narrower than its blocks; an encoder has no logits at all."""
    encoder = transformers.BertModel(tiny.config("bert")).eval()
    assert checked(encoder).head is None
    dense, ids = tiny.build(tmp_path / "dense", "opt-projected"), tiny.token_ids(tmp_path / "ids.npy")
    report = convert(dense, tmp_path / "out", tiny.recipe("auto", ids, reconstruction_steps=2, ignore=("*.project_*",)))
    assert all("error_after" in block and "divergence_after" not in block for block in report.pruning.blocks)


def test_logits_that_mix_tokens_do_not_count(monkeypatch):
    with torch.no_grad():
        model = built(monkeypatch, "llama")
    plain = model.model.norm.forward
    model.model.norm.forward = lambda hidden: plain(hidden.cumsum(1))
    assert checked(model).head is None


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_last_block_is_judged_by_the_models_divergence(tmp_path, monkeypatch, family):
    """What the report says is what whole models, dense and pruned, give on the samples held out."""
    monkeypatch.setattr(tiny, "FAMILIES", tiny.FAMILIES | SCALED)
    dense, ids = tiny.build(tmp_path / "dense", family, dtype=torch.float32), tiny.token_ids(tmp_path / "ids.npy", samples=160, words=9)
    report = convert(dense, tmp_path / "out", tiny.recipe("auto", ids, samples=160, reconstruction_steps=60)).pruning
    first, last = report.blocks
    assert "error_after" in first and "error_after" not in last
    held = torch.from_numpy(np.load(ids))[140:]  # the last of eight batches
    models = [transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (dense, tmp_path / "out")]
    with torch.no_grad():
        wanted, own = (model(input_ids=held, use_cache=False).logits.log_softmax(-1) for model in models)
    found = float(nn.functional.kl_div(own, wanted, reduction="sum", log_target=True)) / held.numel()
    assert last["divergence_after"] == pytest.approx(found, rel=1e-3)
    assert 0 < last["divergence_after"] < last["divergence_before"]


def test_a_depth_with_a_head_counts_nats(monkeypatch):
    with torch.no_grad():
        model = built(monkeypatch, "llama")
    blocks = checked(model)
    hidden = torch.randn(1, 8, 32)
    depth = Depth(blocks.modules[-1], [Call((), {}, None)], [hidden], blocks.head)
    assert float(depth.error(0, hidden)) == pytest.approx(0, abs=1e-6)
    assert float(depth.error(0, 3 * hidden)) == pytest.approx(0, abs=1e-4), "the norm takes sizes away"


def test_blocks_come_to_the_device_when_they_are_looked_at(tmp_path, monkeypatch):
    dense, ids = tiny.build(tmp_path / "dense", num_hidden_layers=8), tiny.token_ids(tmp_path / "ids.npy")
    step, seen = streaming._Stream.step, []

    def look(self, index):
        report = step(self, index)
        weights = [block.mlp.up_proj.weight for block in self.blocks.modules]
        # On a CPU a block's weights are made float32 as it comes; those of blocks that are done go.
        seen.append(
            (
                "".join({True: "-", False: "+"}[w.is_meta] if w.is_meta or w.dtype == torch.float32 else "." for w in weights),
                len(self.dense),
            )
        )
        return report

    monkeypatch.setattr(streaming._Stream, "step", look)
    convert(dense, tmp_path / "out", tiny.recipe("auto", ids, reconstruction_steps=1))
    patterns = ["-+++....", "--+++...", "---+++..", "----+++.", "-----+++", "------++", "-------+", "--------"]
    assert [states for states, _ in seen] == patterns
    assert [streams for _, streams in seen] == [4, 4, 4, 4, 4, 3, 2, 1]
