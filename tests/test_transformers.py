"""Packed checkpoints through plain ``from_pretrained``."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import slidesparse.integrations.transformers as integration
from packed_checkpoint import Written, random_model, save, write
from slidesparse.checkpoint import Recipe, convert
from slidesparse.errors import CheckpointError
from slidesparse.format import SCHEMES
from slidesparse.nn import SlideSparseLinear, pack_model, packing_report
from slidesparse.pattern import Pattern
from slidesparse.pruning import prune
from slidesparse.reference import quantize
from slidesparse.select import matches
from slidesparse.tolerance import check_bitwise

IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1]])


def tiny(kind: str = "llama", **changes: object) -> PretrainedConfig:
    """A configuration with a K (52) whose last group is ragged."""
    sizes: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return CONFIG_MAPPING[kind](**(sizes | changes))


def load(path: Path, **options) -> tuple:
    """On the CPU, wherever the tests run: answers are compared bit by bit."""
    return integration.load(path, device="cpu", **options)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def packed_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SlideSparseLinear)]


def simulate(model: nn.Module, scheme: str) -> nn.Module:
    """The masked model with weights and activations quantised in plain float arithmetic."""

    def quantised_input(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        q, s = quantize(args[0].flatten(0, -2), SCHEMES[scheme])
        return ((q.float() * s).view(args[0].shape).to(args[0].dtype),)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not matches(name, ["lm_head"]):
            q, s = quantize(module.weight.data, SCHEMES[scheme])
            module.weight.data = (q.float() * s).to(module.weight.dtype)
            module.register_forward_pre_hook(quantised_input)
    return model


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "bitnet"]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("scheme", ["bf16", "int8"])
def test_families(kind: str, scheme: str, tmp_path: Path) -> None:
    written = write(tiny(kind, tie_word_embeddings=kind.startswith("gemma")), tmp_path, scheme=scheme)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed_layers(model) == written.layers and len(written.layers) >= 8
    assert model.dtype == torch.bfloat16
    if scheme == "bf16":
        check_bitwise(logits(model), logits(written.model))
    else:
        dense, simulated = logits(written.model).float(), logits(simulate(written.model, scheme)).float()
        # Random models amplify rounding by a factor that varies; a wrong layer would give about 1.4.
        assert (logits(model).float() - dense).norm() < 0.25 * dense.norm()
        assert (logits(model).float() - simulated).norm() < 0.15 * dense.norm()
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, IDS.shape[1] + 4)


@pytest.mark.parametrize("scheme", ["fp16", "fp8", "nvfp4"])
def test_schemes(scheme: str, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 48} if scheme == "nvfp4" else {}
    written = write(tiny("qwen2", **sizes), tmp_path, scheme=scheme, pattern="6:8x2" if scheme == "nvfp4" else "6:8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    dense, ours = logits(written.model).float(), logits(model).float()
    if scheme == "fp16":
        check_bitwise(logits(model), logits(written.model))
    assert (ours - dense).norm() < (0.7 if scheme == "nvfp4" else 0.4) * dense.norm()  # rounding, amplified; see above
    assert (ours - dense).norm() > 0 or scheme == "fp16"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_tied_heads_and_shards(tied: bool, shards: int, tmp_path: Path) -> None:
    written = write(tiny(tie_word_embeddings=tied), tmp_path, shards=shards)
    assert ("lm_head.weight" in written.tensors) is not tied
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    check_bitwise(logits(model), logits(written.model))


@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_never_touch_what_is_stored(scheme: str, dtype: torch.dtype | str, tmp_path: Path) -> None:
    written = write(tiny("qwen2"), tmp_path, scheme=scheme)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = torch.bfloat16 if dtype == "auto" else dtype
    assert model.dtype == wanted and logits(model).dtype == wanted
    state = model.state_dict()
    for name in written.tensors:
        if ".weight_" in name:
            check_bitwise(state[name], written.tensors[name])
        else:
            assert state[name].dtype == wanted
    size = logits(written.model.to(wanted)).float().norm()
    # Against the same rounding in plain arithmetic: some random models amplify what rounding to fp8 changes beyond any bound that tells.
    expected = written.model if scheme == "bf16" else simulate(written.model, scheme)
    difference = (logits(model).float() - logits(expected).float()).norm()
    assert difference <= (1e-5 if scheme == "bf16" and dtype == torch.float32 else 0.2) * size


def test_overrides_ignore_and_a_packed_head(tmp_path: Path) -> None:
    written = write(
        tiny(), tmp_path, overrides={"*.down_proj": "4:6", "lm_head": "8:10"}, ignore=("*.layers.1.self_attn.*", r"re:.*0\.mlp\.up_proj$")
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed_layers(model) == written.layers
    assert "model.layers.0.mlp.up_proj" not in written.layers and "model.layers.1.self_attn.q_proj" not in written.layers
    assert model.lm_head.pattern == Pattern(8, 10) and model.model.layers[0].mlp.down_proj.pattern == Pattern(4, 6)
    check_bitwise(logits(model), logits(written.model))


@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8"])
def test_saving_writes_the_same_form(scheme: str, tmp_path: Path) -> None:
    written = write(tiny("qwen2"), tmp_path / "a", scheme=scheme, overrides={"*.up_proj": "8:10"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    saved = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]
    assert saved == written.config.to_dict()
    found = {}
    for file in (tmp_path / "b").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    assert set(found) == set(written.tensors)
    for name, tensor in written.tensors.items():
        check_bitwise(found[name], tensor)
    check_bitwise(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), logits(model))


def test_other_heads_on_a_packed_body(tmp_path: Path) -> None:
    written = write(tiny(), tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert len(packed_layers(body)) == len(written.layers)
    with torch.no_grad():
        check_bitwise(body(IDS).last_hidden_state, written.model.model(IDS).last_hidden_state)


def drop(name: str) -> Callable:
    return lambda tensors, config: tensors.pop(name)


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    return lambda tensors, config: tensors.update({name: value(tensors[name].clone())})


def setting(key: str, value: object, **others: object) -> Callable:
    return lambda tensors, config: config["quantization_config"].update({key: value, **others})


def flip(keep: torch.Tensor) -> torch.Tensor:
    keep[5, 1] ^= 4
    return keep


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{Q}.weight_values"), f"layer {Q} has no weight_values|tensor .*is missing"),
        (drop(f"{Q}.weight_keep"), f"layer {Q} has no weight_keep"),
        (drop(f"{Q}.weight_scale"), f"layer {Q} has no weight_scale"),
        (drop(f"{Q}.bias"), f"{Q}.bias is missing"),
        (drop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t, c: t.update({"model.layers.7.extra": torch.ones(1)}), "no place for tensor model.layers.7.extra"),
        (lambda t, c: t.update({f"{Q}.weight": torch.ones(32, 32)}), f"no place for tensor {Q}.weight"),
        (put("model.norm.weight", lambda t: t[:-1]), r"model.norm.weight has shape \[31\], the model needs \[32\]"),
        (put(f"{Q}.weight_keep", flip), f"layer {Q}: weight_keep: row 5, group 1 has [57] keep-bits"),
        (put(f"{Q}.weight_values", lambda t: t[:, :-1]), rf"layer {Q}: weight_values is I8 \[32, 23\]"),
        (put(f"{Q}.weight_scale", lambda t: t * float("inf")), f"layer {Q}: weight_scale: row 0 holds inf"),
        (put(f"{Q}.weight_scale", lambda t: t.half()), f"layer {Q}: weight_scale is F16"),
        (setting("pattern", "8:10"), "layer .*pattern 8:10"),
        (setting("pattern", "7:8"), "7:8"),
        (setting("weights", {"dtype": "fp8"}), "activations.dtype is 'int8', which is not implemented: fp8"),
        (setting("weights", {"dtype": "fp8"}, activations={"dtype": "fp8"}), "weight_values is I8"),
        (setting("version", 99), "version 99"),
        (setting("ignore", ["lm_head", Q]), f"layer {Q} is packed, but .*ignore"),
        (setting("ignore", []), "layer lm_head has no weight_values .it is stored dense"),
        (setting("in_features", {Q: 30}), f"layer {Q}: .*K = 30"),
    ],
)
def test_damage_is_an_error_that_names_the_layer(change: Callable, message: str, tmp_path: Path) -> None:
    write(tiny("qwen2"), tmp_path, scheme="int8", change=change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    write(tiny(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors.* damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_importing_again_is_harmless(tmp_path: Path) -> None:
    written = write(tiny(), tmp_path)
    importlib.reload(integration)
    integration.register()
    check_bitwise(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(written.model))


def test_dense_checkpoints_are_not_packed_on_the_fly(tmp_path: Path) -> None:
    random_model(tiny(), torch.bfloat16).save_pretrained(tmp_path)
    config = integration.SlideSparseConfig(**write(tiny(), tmp_path / "other").config.to_dict())
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def tokenizer_files(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(directory)


def dense_twin(directory: Path, scheme: str | None, *, marked: bool = True) -> nn.Module:
    """A masked checkpoint in ordinary form: 16-bit, or compressed-tensors W8A8."""
    model = random_model(tiny("qwen2"), torch.bfloat16)
    written = Written(model, {}, None, directory)
    marker = {"pattern": "6:8", "overrides": {}, "ignore": ["lm_head"]}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = prune(module.weight.data, Pattern(6, 8))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantization = None
    if scheme is not None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[name], scale = quantize(tensors[name], SCHEMES[scheme])
            tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
        kind = "int" if scheme == "int8" else "float"
        weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": weights | {"strategy": "token", "dynamic": True}}
        quantization = {
            "quant_method": "compressed-tensors",
            "format": f"{kind}-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }

    def describe(stored: dict, config: dict) -> None:
        stored.update(tensors)
        config.pop("quantization_config")
        if quantization is not None:
            config["quantization_config"] = quantization
        if marked:
            (config if quantization is None else quantization)["slidesparse"] = marker

    written.config = write(tiny(), directory / "unused").config
    save(written, 1, describe)
    return model


def test_load_packed(tmp_path: Path) -> None:
    written = write(tiny(), tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load(tmp_path)
    assert load(tmp_path, tokenizer=False)[1] is None
    tokenizer_files(tmp_path)
    model, tokenizer = load(tmp_path)
    assert tokenizer("w3 w17")["input_ids"] == [3, 17] and not model.training
    check_bitwise(logits(model), logits(written.model))


def test_load_16_bit_twin(tmp_path: Path) -> None:
    dense = dense_twin(tmp_path, None)
    model, _ = load(tmp_path, tokenizer=False)
    assert len(packed_layers(model)) == 14
    check_bitwise(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert packed_layers(again) == packed_layers(model)
    check_bitwise(logits(again), logits(dense))


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_load_compressed_tensors_twin(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    dense = dense_twin(tmp_path, scheme)
    model, _ = load(tmp_path, tokenizer=False)
    assert len(packed_layers(model)) == 14
    assert model.model.layers[0].mlp.up_proj.scheme.name == scheme
    stray = {"model.layers.0.mlp.up_proj.weight_scale": torch.full((tiny().intermediate_size, 1), 9.0)}
    save_file(stray, tmp_path / "older.safetensors")
    check_bitwise(logits(load(tmp_path, tokenizer=False)[0]), logits(model))
    reference = logits(dense).float()
    ours = logits(model)
    assert (ours.float() - reference).norm() < 0.4 * reference.norm()
    assert len(packed_layers(model)) == 14, "the first forward pass decompresses nothing of ours"
    model.save_pretrained(tmp_path / "again")
    check_bitwise(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), ours)


@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8", "nvfp4"])
def test_packed_and_twin_give_one_answer(scheme: str, tmp_path: Path) -> None:
    if scheme != "bf16":
        pytest.importorskip("compressed_tensors")
    random_model(tiny("qwen2", intermediate_size=48), torch.bfloat16).save_pretrained(tmp_path / "source")
    pattern = Pattern.parse("6:8x2" if scheme == "nvfp4" else "6:8")
    for form in ("packed", "dense"):
        convert(tmp_path / "source", tmp_path / form, Recipe(pattern, "magnitude", scheme, form))
    packed, twin = (load(tmp_path / form, tokenizer=False)[0] for form in ("packed", "dense"))
    assert packed_layers(packed) == packed_layers(twin) and len(packed_layers(twin)) == 14
    for name, tensor in packed.state_dict().items():
        check_bitwise(twin.state_dict()[name], tensor)
    check_bitwise(logits(twin), logits(packed))


def test_merged_experts_and_renamed_layers(tmp_path: Path) -> None:
    """Mixtral's files name other layers than its modules do, and its experts are merged on the way in."""
    config = tiny("mixtral", intermediate_size=64, num_local_experts=2, num_experts_per_tok=1)
    random_model(config, torch.bfloat16).save_pretrained(tmp_path / "source")
    for form in ("packed", "dense"):
        convert(tmp_path / "source", tmp_path / form, Recipe(Pattern(6, 8), "magnitude", form=form))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert len(packed_layers(model)) == 8
    check_bitwise(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")))


def test_unmarked_checkpoints_load_as_they_are_until_packed(tmp_path: Path) -> None:
    dense = dense_twin(tmp_path, None, marked=False)
    model, _ = load(tmp_path, tokenizer=False)
    assert packed_layers(model) == []
    pack_model(model, pattern="6:8", scheme="int8")
    assert len(packed_layers(model)) == 14 and list(packing_report(model).dense) == ["lm_head"]
    reference = logits(dense).float()
    assert (logits(model).float() - reference).norm() < 0.25 * reference.norm()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json"),
        ("{", "cannot read"),
        ("[]", "model configuration"),
        ('{"model_type": "llama"}', r"holds no model\.safetensors"),
        ('{"model_type": "nonesuch", "weights": "here"}', "transformers cannot load it"),
    ],
)
def test_load_says_what_is_wrong(config: str | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
        if "weights" in config:
            save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, tokenizer=False)
    with pytest.raises(CheckpointError, match="no such directory"):
        load(tmp_path / "nowhere")
