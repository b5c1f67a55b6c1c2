"""What calibrated pruning reads: sources, samples, and the text that comes with the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from slidesparse.checkpoint import calibration as reading
from slidesparse.checkpoint.calibration import Calibration, read_texts, read_token_ids
from slidesparse.errors import CheckpointError, UnsupportedError
from slidesparse.integrations.calibration import calibration_samples

BOS = 1


class Letters:
    """A tokenizer's interface with one token per character, and BOS before a text and EOS after it where ``special``."""

    def __init__(self, special: bool = False) -> None:
        self.special = special
        self.characters = 0

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        self.characters += len(text)
        ids = [ord(character) + 10 for character in text]
        return {"input_ids": [BOS, *ids, 2] if self.special and add_special_tokens else ids}


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def numbered(path: Path, count: int) -> str:
    """A file of ``count`` lines of four characters, every one another."""
    return written(path, "".join(f"{line:03}\n" for line in range(count)))


def text_of(row: torch.Tensor) -> str:
    return "".join(chr(token - 10) for token in row.tolist())


def whole(source: str | None) -> str:
    return "".join(read_texts(Calibration(source)).pieces)


# ---------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"samples": 0}, "samples"),
        ({"samples": True}, "True"),
        ({"length": -1}, "-1"),
        ({"length": 2.5}, "2.5"),
        ({"source": " "}, "' '"),
        ({"source": "a.txt,,b.txt"}, "a.txt,,b.txt"),
    ],
)
def test_nonsense_is_refused_with_its_value(given: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Calibration(**given)


def test_the_fingerprint_tells_jobs_apart_by_what_the_files_hold(tmp_path: Path) -> None:
    source = written(tmp_path / "a.txt", "one")
    first = Calibration(source).fingerprint()
    assert json.loads(json.dumps(first)) == first == Calibration(source).fingerprint()
    written(tmp_path / "a.txt", "two")
    others = [Calibration(source), Calibration(source, samples=64), Calibration(source, length=64), Calibration(), Calibration("corpus:en")]
    seen = [first, *(other.fingerprint() for other in others)]
    assert len({json.dumps(one) for one in seen}) == len(seen)


# ---------------------------------------------------------------------------------------------- sources of text


def test_a_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    texts = read_texts(Calibration(written(tmp_path / "a.txt", "\ufeffÄ line\r\nand\n\n  another")))
    assert "".join(texts.pieces) == "Ä line\nand\n\n  another\n\n"
    assert texts.description == f"the file {tmp_path / 'a.txt'}"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson"])
def test_json_lines_give_documents_with_blank_lines_between(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"text": "one\n", "content": "not this"},
        {"content": "two"},
        {"prompt": "three?", "completion": "Three."},
        {"text": " "},
    ]
    source = written(tmp_path / f"a{suffix}", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert whole(source).rstrip() == "one\n\ntwo\n\nthree?\nThree."


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"title": "x", "body": "y"}', "title, body"),
        ("{}", "no key at all"),
        ('["text"]', "list"),
        ('{"text": 3}', "text is not text, but int"),
        ('{"prompt": "x"}', "prompt"),
        ('{"text": "cut', "not JSON"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str, told: str) -> None:
    source = written(tmp_path / "bad.jsonl", '{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(CheckpointError, match=r"bad\.jsonl, line 3: ") as error:
        whole(source)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_files_can_be_joined_with_commas(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one.txt", "first"), written(tmp_path / "two.jsonl", '{"text": "second"}')
    assert whole(f"{one}, {two}").split("\n\n") == ["first", "second", "", ""]
    assert read_texts(Calibration(f"{one},{two}")).description == f"the files {one}, {two}"
    odd = written(tmp_path / "a, b.txt", "a name with a comma")
    assert whole(odd).startswith("a name")
    assert len(Calibration(",".join([one] * 300)).files()) == 300  # longer than any file's name can be


def test_text_comes_in_pieces_that_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 100)
    source = numbered(tmp_path / "long.txt", 500)
    pieces = list(read_texts(Calibration(source)).pieces)
    assert "".join(pieces) == Path(source).read_text() + "\n\n"
    assert len(pieces) > 10 and max(map(len, pieces)) < 110
    assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"good\n\xff\xfe bad\n", "not UTF-8 text: invalid start byte in line 2"), (b"", "holds no text"), (b" \n\n", "holds no text")],
)
def test_a_file_without_readable_text_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        whole(str(tmp_path / "a.txt"))


def test_folders_and_missing_files_are_no_data_sets(tmp_path: Path) -> None:
    there = written(tmp_path / "there.txt", "text")
    with pytest.raises(CheckpointError, match="is a folder"):
        Calibration(str(tmp_path)).files()
    for missing in (str(tmp_path / "missing"), "missing.txt", "corpus/missing.jsonl", f"{there},missing", "./missing"):
        with pytest.raises(CheckpointError, match=r"missing\S*: no such file"):
            calibration_samples(Letters(), Calibration(missing))
    assert Calibration("missing").files() is None and Calibration("owner/missing:config").files() is None


# ---------------------------------------------------------------------------------------------- samples


def test_samples_are_disjoint_pieces_of_the_text_in_its_order(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.txt", 100)
    samples = calibration_samples(Letters(), Calibration(source, samples=5, length=40), seed=3)
    assert samples.tokens.dtype == torch.int64 and samples.tokens.shape == (5, 40)
    starts = [int(text_of(row)[:3]) for row in samples.tokens]
    assert starts == sorted(set(starts)) and all(start % 10 == 0 for start in starts)
    assert all(text_of(row) == Path(source).read_text()[start * 4 :][:40] for row, start in zip(samples.tokens, starts, strict=True))
    assert samples.description == f"5 of the 10 samples of 40 tokens that the file {source} gives, chosen by seed 3"


def test_the_seed_chooses(tmp_path: Path) -> None:
    calibration = Calibration(numbered(tmp_path / "a.txt", 900), samples=20, length=40)
    one, again, other = (calibration_samples(Letters(), calibration, seed).tokens for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_too_few_samples_are_said_and_none_is_an_error(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.txt", 25)
    few = calibration_samples(Letters(), Calibration(source, samples=8, length=40))
    assert few.tokens.shape == (2, 40)
    assert few.description == f"the file {source} gives 2 samples of 40 tokens, 8 were asked for"
    exact = calibration_samples(Letters(), Calibration(source, samples=2, length=40))
    assert torch.equal(exact.tokens, few.tokens) and exact.description == f"the file {source} gives 2 samples of 40 tokens"
    with pytest.raises(CheckpointError, match=r"102 tokens are too few for one sample of 103: .*--length"):
        calibration_samples(Letters(), Calibration(source, length=103))


def test_every_sample_begins_as_a_text_begins_for_the_tokenizer(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.txt", 30)
    tokens = calibration_samples(Letters(special=True), Calibration(source, samples=3, length=41)).tokens
    assert tokens.shape == (3, 41) and (tokens[:, 0] == BOS).all()
    assert "".join(map(text_of, tokens[:, 1:])) == Path(source).read_text()  # EOS stands nowhere
    with pytest.raises(CheckpointError, match="puts 1 tokens before a text"):
        calibration_samples(Letters(special=True), Calibration(source, length=1))


def test_of_a_long_text_only_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 100)
    tokenizer = Letters()
    samples = calibration_samples(tokenizer, Calibration(numbered(tmp_path / "a.txt", 990), samples=2, length=40))
    assert samples.description.startswith("2 of the 8 samples of 40 tokens that the beginning of the file ")
    assert 2 * 4 * 40 < tokenizer.characters < 2 * 4 * 40 + 200


def test_samples_through_a_real_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({"<s>": 0, "?": 1} | {f"{word:03}": word + 2 for word in range(100)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="?")
    tokens = calibration_samples(tokenizer, Calibration(numbered(tmp_path / "a.txt", 100), samples=3, length=31)).tokens
    assert tokens.tolist() == [[0, *range(2 + 30 * row, 32 + 30 * row)] for row in range(3)]


# ---------------------------------------------------------------------------------------------- token ids


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    ids = np.arange(60, dtype=np.uint16).reshape(3, 20)
    np.save(path, ids)
    taken = calibration_samples(None, Calibration(str(path), samples=3, length=20))
    assert taken.tokens.dtype == torch.int64 and taken.tokens.tolist() == ids.tolist()
    assert taken.description == f"the file of token ids {path} gives 3 samples of 20 tokens"
    # Rows are cut one by one: a sample never joins two of them.
    shorter = calibration_samples(None, Calibration(str(path), samples=9, length=9)).tokens
    assert shorter.tolist() == [ids[row, begin : begin + 9].tolist() for row in range(3) for begin in (0, 9)]
    np.save(path, ids.reshape(-1))
    assert calibration_samples(None, Calibration(str(path), samples=9, length=30)).tokens.tolist() == ids.reshape(2, 30).tolist()
    some = calibration_samples(None, Calibration(str(path), samples=2, length=10), seed=1)
    assert some.tokens.shape == (2, 10) and some.description.endswith("chosen by seed 1")
    with pytest.raises(CheckpointError, match=r"60 tokens are too few for one sample of 64"):
        calibration_samples(None, Calibration(str(path), length=64))


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((2, 3), dtype=np.float32), "float32"),
        (np.zeros((2, 3, 4), dtype=np.int64), r"\[2, 3, 4\]"),
        (np.zeros((0, 4), dtype=np.int64), r"\[0, 4\]"),
        (np.array([3, -5, 1]), "-5"),
        (np.array([{}]), "cannot read token ids"),
    ],
)
def test_what_is_no_token_ids_is_refused(tmp_path: Path, array: np.ndarray, told: str) -> None:
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    with pytest.raises(CheckpointError, match=told):
        read_token_ids(tmp_path / "ids.npy")


def test_token_ids_are_not_mixed_with_text(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(8))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "ids.npy").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot be joined"):
        Calibration(f"{tmp_path / 'ids.npy'},{written(tmp_path / 'a.txt', 'a')}").files()
    with pytest.raises(CheckpointError, match="token ids, not text"):
        read_texts(Calibration(str(tmp_path / "ids.npy")))
    with pytest.raises(CheckpointError, match=r"cannot read token ids from .*cut\.npy"):
        read_token_ids(tmp_path / "cut.npy")


# ---------------------------------------------------------------------------------------------- data sets


def stand_in(monkeypatch: pytest.MonkeyPatch, rows: Iterator[object]) -> list[tuple]:
    """Put a package in the place of datasets that gives ``rows``; returns what it was asked for."""
    asked: list[tuple] = []

    def load_dataset(*names: object, **options: object) -> Iterator[object]:
        asked.append((*names, options))
        return rows

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_is_streamed_until_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 100)
    rows = ({"text": f"{row:08}"} for row in range(10**9))
    asked = stand_in(monkeypatch, rows)
    samples = calibration_samples(Letters(), Calibration("owner/corpus:en", samples=2, length=50))
    assert asked == [("owner/corpus", "en", {"split": "train", "streaming": True})]
    assert samples.tokens.shape == (2, 50)
    assert "the beginning of the data set owner/corpus:en" in samples.description
    assert int(next(rows)["text"]) < 60


def test_a_data_set_without_text_names_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, iter([{"text": "a"}, {"question": "b", "answer": "c"}]))
    with pytest.raises(CheckpointError, match=r"data set corpus, row 1: .*question, answer"):
        calibration_samples(Letters(), Calibration("corpus", length=4))


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> Iterator[object]:
        raise ConnectionError("Couldn't reach 'corpus'\nand more")
        yield

    stand_in(monkeypatch, unreachable())
    with pytest.raises(CheckpointError) as error:
        calibration_samples(Letters(), Calibration("corpus"))
    assert "no file corpus" in str(error.value) and "Couldn't reach 'corpus'" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(UnsupportedError, match=r"^there is no file corpus; .*pip install datasets"):
        calibration_samples(Letters(), Calibration("corpus"))


# ---------------------------------------------------------------------------------------------- the built-in text


def test_the_built_in_text_is_small_and_clean() -> None:
    (file,) = Calibration().files()
    raw = file.read_bytes()
    assert 200_000 < len(raw) <= 300_000
    text = raw.decode("utf-8")
    assert text == whole(None).rstrip("\n") + "\n"
    assert all(character.isprintable() or character == "\n" for character in text)
    assert sum(ord(character) > 127 for character in text) < 50
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert (file.parent / "README.md").is_file()  # says where each part is from


def test_no_part_of_the_built_in_text_comes_twice() -> None:
    lines = [line for line in whole(None).splitlines() if len(line) > 60]
    assert len(lines) > 900 and len(set(lines)) == len(lines)


def test_the_built_in_text_is_varied_from_its_beginning() -> None:
    text = whole(None)
    tenth = len(text) // 10
    marks = {"dialogue": '"I ', "SQL": "SQLite", "facts": "Natural resources:", "lists": "\n- ", "questions": "?\n", "code": "    return "}
    for begin in range(0, tenth * 10, tenth):
        found = [name for name, mark in marks.items() if mark in text[begin : begin + tenth]]
        assert len(found) >= 4, f"characters {begin} to {begin + tenth} hold only {found}"


def test_the_built_in_text_gives_thirty_samples_of_the_default_length() -> None:
    class Quarters(Letters):
        """Four characters to a token, as tokenizers of language models have in English."""

        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [sum(map(ord, text[i : i + 4])) for i in range(0, len(text), 4)]}

    samples = calibration_samples(Quarters(), Calibration())
    assert samples.tokens.shape[0] >= 30 and samples.tokens.shape[1] == 2048
    assert samples.description == f"the built-in text gives {len(samples.tokens)} samples of 2048 tokens, 128 were asked for"
