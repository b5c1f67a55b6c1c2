"""LoRA by peft on packed layers: trained, saved, loaded, and merged once the model is dense again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import slidesparse.integrations.transformers  # noqa: F401 - registers the packed form
import tiny
from slidesparse import Recipe, convert, restore_model
from slidesparse.errors import UnsupportedError
from slidesparse.nn import SlideSparseLinear
from slidesparse.tolerance import check_bitwise

peft = pytest.importorskip("peft")
IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1]])


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_adapters_on_packed_layers(scheme: str | None, tmp_path: Path) -> None:
    from slidesparse.integrations.peft import packed_lora

    convert(tiny.build(tmp_path / "dense"), tmp_path / "packed", Recipe(tiny.SIX, "magnitude", scheme))
    model = load(tmp_path / "packed")
    before = logits(model)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, packed_lora(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])))
    check_bitwise(logits(adapted), before)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 8
    optimiser = torch.optim.Adam(trained, lr=0.03)
    losses = []
    for _ in range(8):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]

    adapted.save_pretrained(tmp_path / "adapter")
    config = packed_lora(peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(load(tmp_path / "packed"), tmp_path / "adapter", config=config)
    check_bitwise(logits(again), logits(adapted))
    for name, tensor in load(tmp_path / "packed").state_dict().items():
        check_bitwise(tensor, stored[name])

    with pytest.raises(UnsupportedError, match=r"layer model\.layers\.0\.self_attn\.q_proj: adapters cannot be merged"):
        again.merge_and_unload()
    merged = restore_model(again).merge_and_unload()
    assert not any(isinstance(module, SlideSparseLinear) for module in merged.modules())
    assert (logits(merged) - logits(adapted)).float().norm() < 0.1 * logits(adapted).float().norm()
    merged.save_pretrained(tmp_path / "merged")
    check_bitwise(logits(load(tmp_path / "merged")), logits(merged))


def test_all_linear_layers_are_not_the_packed_ones() -> None:
    from slidesparse.integrations.peft import packed_lora

    with pytest.raises(UnsupportedError, match="name these in target_modules"):
        packed_lora(peft.LoraConfig(target_modules="all-linear"))
