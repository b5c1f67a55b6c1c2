"""What a checkpoint says of its layers, by an engine's names for them: engines merge layers and rename modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import CheckpointError
from ...format import PackedConfig
from ...pattern import KNOWN, Pattern, tightest_first
from ...select import DEFAULT_IGNORE, matches


def part_names(layer: str, merged: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """A checkpoint's names of the layers that an engine merges into one: ``….qkv_proj`` → ``….q_proj``, ``….k_proj``, ``….v_proj``."""
    head, dot, last = layer.rpartition(".")
    return tuple(f"{head}{dot}{part}" for part in merged.get(last) or (last,))


@dataclass(frozen=True)
class Claims:
    """Patterns by layer: ``pattern`` for all but those in ``overrides``, None where the weights decide; layers in ``ignore`` stay dense."""

    pattern: Pattern | None = None
    overrides: Mapping[str, Pattern] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    in_features: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_packed(cls, config: PackedConfig) -> Claims:
        """Those of a packed checkpoint."""
        return cls(config.pattern, config.overrides, tuple(config.ignore), config.in_features)

    @classmethod
    def of_marker(cls, marker: Any) -> Claims:
        """Those of a portable dense twin; without a marker no claims, and the usual layers stay dense.

        Raises:
            CheckpointError: the marker is not of its form.
        """
        if marker is None:
            return cls(ignore=DEFAULT_IGNORE)
        if not isinstance(marker, dict):
            raise CheckpointError(f"config.json: slidesparse must be an object with a pattern, got {marker!r}")
        ignore, overrides = marker.get("ignore", DEFAULT_IGNORE), marker.get("overrides") or {}
        listed = isinstance(ignore, list | tuple) and all(isinstance(entry, str) for entry in ignore)
        if not listed or not isinstance(overrides, dict):
            raise CheckpointError("config.json: slidesparse.overrides must map layers to patterns, slidesparse.ignore list layers")
        try:
            return cls(
                Pattern.parse(marker.get("pattern", "")), {name: Pattern.parse(text) for name, text in overrides.items()}, tuple(ignore)
            )
        except ValueError as error:
            raise CheckpointError(f"config.json: slidesparse: {error}") from error

    def renamed(self, rename: Callable[[str], str | None]) -> Claims:
        """The same claims under an engine's names; only full paths are renamed, those without an engine's counterpart left out."""

        def new(name: str) -> str | None:
            return rename(name) if "." in name and not name.startswith("re:") and "*" not in name else name

        overrides = {new(name): pattern for name, pattern in self.overrides.items()}
        in_features = {new(name): k for name, k in self.in_features.items()}
        ignore = (new(name) for name in self.ignore)
        return replace(
            self,
            overrides={name: pattern for name, pattern in overrides.items() if name is not None},
            in_features={name: k for name, k in in_features.items() if name is not None},
            ignore=tuple(name for name in ignore if name is not None),
        )

    def stays_dense(self, layer: str, parts: Sequence[str]) -> bool:
        """Whether a layer, made of these parts, is left alone.

        Raises:
            CheckpointError: only some of its parts are.
        """
        if matches(layer, self.ignore):
            return True
        dense = [part for part in parts if matches(part, self.ignore)]
        if dense and len(dense) < len(parts):
            packed = ", ".join(part for part in parts if part not in dense)
            raise CheckpointError(
                f"layer {layer} is merged of {', '.join(dense)}, which stays dense, and {packed}, which does not: convert all or none"
            )
        return bool(dense)

    def patterns(self, parts: Sequence[str]) -> tuple[Pattern, ...]:
        """The patterns that a layer of these parts may obey as a whole, tightest first."""
        found = [self.overrides.get(part, self.pattern) for part in parts]
        named = {pattern for pattern in found if pattern is not None}
        return KNOWN if None in found else tightest_first(named)

    def stored_pattern(self, layer: str, parts: Sequence[str]) -> Pattern:
        """The one pattern in which all parts of a packed layer are stored.

        Raises:
            CheckpointError: they are stored in several.
        """
        found = self.patterns(parts)
        if len(found) > 1:
            told = ", ".join(f"{part} ({self.overrides.get(part, self.pattern)})" for part in parts)
            raise CheckpointError(
                f"layer {layer} is merged of {told}: parts packed in different patterns cannot be merged; convert them to one"
            )
        return found[0]

    def check_width(self, layer: str, parts: Sequence[str], k: int) -> None:
        """Hold K of a model's layer against what the checkpoint says.

        Raises:
            CheckpointError: they differ.
        """
        for part in parts:
            if self.in_features.get(part, k) != k:
                raise CheckpointError(
                    f"layer {layer}: config.json says K = {self.in_features[part]} for {part} (in_features), the model has {k}"
                )
