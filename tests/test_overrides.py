"""Patterns of single layers: from the command line's file through every stored form, and every way to get them wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import models
from slidesparse import reference
from slidesparse.checkpoint import Checkpoint, Recipe, convert, inspect, read_overrides, verify
from slidesparse.checkpoint.overrides import override_of
from slidesparse.errors import PatternError, UnsupportedError
from slidesparse.format import PackedConfig
from slidesparse.pattern import Pattern
from test_convert import restored, same

FOUR, SIX, EIGHT, TEN = map(Pattern.parse, ("2:4", "4:6", "6:8", "8:10"))
MIXED = {"*.down_proj": TEN, "*.0.self_attn.qkv_proj": FOUR, r"re:.*\.1\.mlp\.gate_up": SIX, "model.layers.1.self_attn.o_proj": FOUR}


def expected(layer: str, pairs: bool = False) -> Pattern:
    """The pattern that `MIXED` over 6:8 gives a layer, told without globs."""
    block, kind = layer.split(".")[2], layer.rpartition(".")[2]
    if kind == "down_proj":
        found = TEN
    elif (block, kind) == ("1", "o_proj") or (block == "0" and kind in ("q_proj", "k_proj", "v_proj")):
        found = FOUR
    else:
        found = SIX if block == "1" and kind in ("gate_proj", "up_proj") else EIGHT
    return Pattern(found.kept, found.group, unit=2) if pairs else found


def layers_of(path: Path) -> list[str]:
    return [name for name in Checkpoint.open(path).layers if "proj" in name]


@pytest.fixture
def dense(tmp_path):
    return models.write(tmp_path / "source")


@pytest.mark.parametrize("scheme", [None, "int8", "fp8", "nvfp4"])
def test_every_stored_form_has_each_layers_own_pattern(tmp_path, scheme):
    pairs = scheme == "nvfp4"
    source = models.write(tmp_path / "source", models.llama_tensors(inner=112 if pairs else 100))
    overrides = {entry: Pattern(one.kept, one.group, unit=2) if pairs else one for entry, one in MIXED.items()}
    wanted = {layer: expected(layer, pairs) for layer in layers_of(source)}
    assert len(set(wanted.values())) == 4
    common = Pattern(6, 8, unit=2) if pairs else EIGHT
    for form in ("packed", "dense"):
        report = convert(source, tmp_path / form, Recipe(common, "magnitude", scheme, form, overrides=overrides))
        assert {layer.name: layer.pattern for layer in report.layers} == {layer: str(one) for layer, one in wanted.items()}
        shown = inspect(tmp_path / form)
        assert {row.name: row.pattern for row in shown.layers} == {layer: str(one) for layer, one in wanted.items()}
        proof = verify(tmp_path / form, source)
        assert not shown.problems and proof.ok
        assert {layer.name: layer.pattern for layer in proof.layers} == {layer: str(one) for layer, one in wanted.items()}
    packed, twin = PackedConfig.from_dict(models.config_of(tmp_path / "packed")["quantization_config"]), Checkpoint.open(tmp_path / "dense")
    assert {layer: packed.pattern_of(layer) for layer in wanted} == wanted == {layer: twin.marked_pattern(layer) for layer in wanted}
    weights, before = models.read(tmp_path / "dense"), models.read(source)
    for layer, pattern in wanted.items():
        if not pairs:
            assert same(restored(tmp_path / "packed", layer), weights[f"{layer}.weight"])
        if scheme is None:
            assert same(weights[f"{layer}.weight"], reference.prune(before[f"{layer}.weight"], pattern))
    # The marker alone is enough to pack the twin, and the packed form to write the twin.
    convert(tmp_path / "dense", tmp_path / "again", Recipe())
    assert models.config_of(tmp_path / "again") == models.config_of(tmp_path / "packed")
    one, other = models.read(tmp_path / "again"), models.read(tmp_path / "packed")
    assert one.keys() == other.keys() and all(same(one[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize(
    ("entries", "pattern"),
    [
        ({}, None),
        ({"b.*": FOUR}, None),
        ({"a.*": FOUR, "*": SIX}, SIX),
        ({"*": SIX, "a.*": FOUR}, FOUR),
        ({"a.k_proj": TEN, "a.qkv_proj": FOUR, "*": SIX}, TEN),
        ({"a.qkv_proj": FOUR, "a.*": SIX}, FOUR),
        ({"*.qkv_proj": FOUR, "*.gate_up_proj": SIX}, FOUR),
        ({"re:.*qkv_proj$": FOUR}, FOUR),
        ({"k_proj": FOUR, "qkv_proj": FOUR, "a.q_proj": FOUR}, None),
    ],
)
def test_which_entry_counts(entries, pattern):
    assert override_of("a.k_proj", entries) == pattern


def test_parts_that_engines_merge_share_a_pattern(tmp_path, dense):
    attention, mlp = "model.layers.1.self_attn", "model.layers.0.mlp"
    for overrides, words in (
        ({"*.k_proj": TEN}, (r"0\.self_attn\.q_proj \(6:8\)", r"0\.self_attn\.k_proj \(8:10\)", r"v_proj \(6:8\)", r"name .*\.qkv_proj")),
        ({f"{attention}.qkv_proj": TEN, f"{attention}.v_proj": FOUR}, (rf"{attention}\.v_proj \(2:4\)", rf"name {attention}\.qkv_proj")),
        ({f"{mlp}.gate_proj": TEN}, (rf"{mlp}\.gate_proj \(8:10\), {mlp}\.up_proj \(6:8\)", rf"name {mlp}\.gate_up_proj")),
    ):
        for form in ("packed", "dense"):
            with pytest.raises(UnsupportedError) as caught:
                convert(dense, tmp_path / "out", Recipe(EIGHT, "magnitude", form=form, overrides=overrides))
            for word in words:
                assert caught.match(word)
    with pytest.raises(UnsupportedError, match=r"k_proj \(to be detected\), .*q_proj \(8:10\)"):
        convert(dense, tmp_path / "out", Recipe(overrides={f"{attention}.q_proj": TEN}))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(dense, tmp_path / "out", Recipe(EIGHT, "magnitude", overrides={f"{attention}.{part}_proj": TEN for part in "qkv"}))
    assert verify(tmp_path / "out", dense).ok


def test_parts_that_differ_already_are_left_to_those_who_made_them(tmp_path):
    key, other = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"
    tensors = models.llama_tensors()
    for name, weight in tensors.items():
        if "proj" in name:
            tensors[name] = reference.prune(weight, SIX if name.startswith(key) else EIGHT)
    marked = models.LLAMA | {"dtype": "bfloat16", "slidesparse": {"pattern": "6:8", "overrides": {key: "4:6"}, "ignore": ["lm_head"]}}
    source = models.write(tmp_path / "source", tensors, marked)
    convert(source, tmp_path / "out", Recipe(overrides={"*.o_proj": EIGHT}))
    assert {layer.name: layer.pattern for layer in verify(tmp_path / "out", source).layers}[key] == "4:6"
    with pytest.raises(UnsupportedError, match=rf"{key} \(4:6\), .*{other} \(6:8\)"):
        convert(source, tmp_path / "no", Recipe(overrides={other: EIGHT}))


def test_entries_that_mean_no_layer_to_convert_are_named(tmp_path, dense):
    for recipe in (
        Recipe(EIGHT, "magnitude", overrides={"*.o_proj": TEN, "*.typo_proj": TEN}),
        Recipe(EIGHT, "magnitude", overrides={"*.typo_proj": TEN, "*": SIX}),
        Recipe(EIGHT, "magnitude", overrides={"*.typo_proj": TEN}, ignore=("*.down_proj",)),
    ):
        with pytest.raises(UnsupportedError, match=r"'\*\.typo_proj' matches no layer to convert"):
            convert(dense, tmp_path / "out", recipe)
    for left in ({"ignore": ("*.down_proj",)}, {"only": ("*.o_proj",)}):
        with pytest.raises(UnsupportedError, match=r"'\*\.down_proj' matches no layer"):
            convert(dense, tmp_path / "out", Recipe(EIGHT, "magnitude", overrides={"*.down_proj": TEN}, **left))
    with pytest.raises(UnsupportedError, match="embed_tokens"):
        convert(dense, tmp_path / "out", Recipe(EIGHT, "magnitude", overrides={"model.embed_tokens": TEN}))
    with pytest.raises(ValueError, match=r"bad regular expression 're:\('"):
        Recipe(EIGHT, "magnitude", overrides={"re:(": TEN})
    with pytest.raises(ValueError, match="obey"):
        Recipe(scheme="int8", form="dense", obey=False, overrides={"*": TEN})
    assert not (tmp_path / "out").exists()


def test_patterns_must_fit_the_scheme_and_the_layer(tmp_path):
    source = models.write(tmp_path / "source", models.llama_tensors(inner=112))
    with pytest.raises(UnsupportedError, match=r"layer model\.layers\.0\.mlp\.down_proj: nvfp4 stores pairs .*use 8:10x2"):
        convert(source, tmp_path / "out", Recipe(Pattern.parse("6:8x2"), "magnitude", "nvfp4", overrides={"*.down_proj": TEN}))
    odd = models.write(tmp_path / "odd", models.llama_tensors(inner=101))
    with pytest.raises(UnsupportedError, match=r"layer model\.layers\.0\.mlp\.down_proj: K = 101"):
        convert(odd, tmp_path / "out", Recipe(EIGHT, "magnitude", overrides={"*.down_proj": Pattern.parse("6:8x2")}))


def test_without_pruning_a_layer_must_obey_its_own_pattern(tmp_path, dense):
    convert(dense, tmp_path / "masked", Recipe(EIGHT, "magnitude", form="dense", overrides={"*.down_proj": FOUR}))
    for form in ("packed", "dense"):
        with pytest.raises(PatternError, match=r"layer model\.layers\.0\.mlp\.down_proj.*2:4"):
            convert(dense, tmp_path / "no", Recipe(EIGHT, form=form, overrides={"*.down_proj": FOUR}))
        with pytest.raises(PatternError, match=r"layer model\.layers\.\d\.self_attn\.o_proj.*2:4"):
            convert(tmp_path / "masked", tmp_path / "no", Recipe(form=form, overrides={"*.o_proj": FOUR}))
        # Rows of 2:4 obey 6:8, too; the others are taken as they are marked.
        convert(tmp_path / "masked", tmp_path / form, Recipe(form=form, overrides={"*.0.mlp.down_proj": EIGHT}))
        found = {layer.name: layer.pattern for layer in verify(tmp_path / form, dense).layers}
        assert [found[f"model.layers.{i}.mlp.down_proj"] for i in range(2)] == ["6:8", "2:4"]
    convert(tmp_path / "packed", tmp_path / "repacked", Recipe(overrides={"*.1.mlp.down_proj": EIGHT}))
    assert not models.config_of(tmp_path / "repacked")["quantization_config"]["overrides"]


def test_a_job_is_another_with_other_overrides(tmp_path, dense):
    recipes = [
        Recipe(EIGHT, "magnitude", overrides=one) for one in ({}, {"*": TEN}, {"*": SIX}, {"a": SIX, "*": TEN}, {"*": TEN, "a": SIX})
    ]
    told = [json.dumps(recipe.to_dict(), sort_keys=True) for recipe in recipes]
    assert len(set(told)) == len(recipes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read"),
        ("{'a': 1}", "is not JSON"),
        ("\x00", "is not JSON"),
        ('[["a", "6:8"]]', "must hold an object"),
        ('"6:8"', "must hold an object"),
        ('{"a": "7:8"}', "'a': pattern 7:8 .*12:14, 14:16, 16:18 .weights that are 7:8 obey 14:16"),
        ('{"a": 8}', "'a': cannot read pattern 8"),
        ('{"a": {"b": "6:8"}}', "'a': cannot read pattern"),
        ('{"a": "6:8", "b": "dense"}', "'b': dense is not a pattern.*--ignore"),
        ('{"a": "6:8", "b": "8:10", "a": "6:8"}', "'a' is there twice"),
    ],
)
def test_files_that_are_no_overrides_say_why(tmp_path, text, words):
    file = tmp_path / "overrides.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UnsupportedError, match=words) as caught:
        read_overrides(file)
    assert str(file) in str(caught.value)


def test_the_command_line_takes_a_file(run, tmp_path, dense):
    file = tmp_path / "overrides.json"
    file.write_text(json.dumps({entry: str(pattern) for entry, pattern in MIXED.items()}))
    assert read_overrides(file) == MIXED and list(read_overrides(file)) == list(MIXED)
    wanted = {layer: str(expected(layer)) for layer in layers_of(dense)}
    masked = tmp_path / "prune"
    for command, source, *options in (
        ("prune", dense, "--method", "magnitude"),
        ("convert", dense, "--method", "magnitude", "--scheme", "int8"),
        ("pack", masked, "--pattern", "6:8"),
    ):
        code, out, err = run(command, source, tmp_path / command, "--overrides", file, "--json", *options)
        assert code == 0, err
        assert {layer["name"]: layer["pattern"] for layer in json.loads(out)["layers"]} == wanted
    assert verify(tmp_path / "pack", masked).ok
    code, out, _ = run("inspect", tmp_path / "convert", "--layers")
    assert code == 0 and all(pattern in out for pattern in wanted.values())
    for text, words in (('{"*.k_proj": "8:10"}', "k_proj (8:10)"), ('{"x": "8:10"}', "'x' matches no layer"), ("[", "is not JSON")):
        file.write_text(text)
        code, _, err = run("convert", dense, tmp_path / "no", "--overrides", file)
        assert code == 1 and err.strip().count("\n") == 0 and words in err
        assert not (tmp_path / "no").exists()
