"""Versions of other libraries that this package was tested with, and the sentences about others."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

from ..errors import UnsupportedError


@dataclass(frozen=True)
class Tested:
    """The oldest and the newest version tested, as ``major.minor``."""

    oldest: str
    newest: str


TESTED = {
    "torch": Tested("2.11", "2.14"),
    "triton": Tested("3.6", "3.9"),
    "transformers": Tested("5.6", "5.24"),
    "vllm": Tested("0.26", "0.26"),
    "nvmath-python": Tested("1.0", "1.0"),
}
"""By the package's name. Floors in pyproject.toml are the oldest ones; a newer version than the newest runs, and `doctor` says so."""


def numbers(version: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) of what has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def untested(library: str, version: str) -> str | None:
    """What to know of a version newer than the newest tested; None of others."""
    known = TESTED.get(library)
    if known is None or numbers(version) <= numbers(known.newest):
        return None
    return f"newer than {known.newest}, the newest version tested: where something fails, install '{library}=={known.newest}.*'"


def lacks(library: str, name: str) -> str:
    """The sentence about a name that the installed version does not have."""
    return f"{library} {installed(library)} has no {name}, which slidesparse uses: {_remedy(library)}"


def not_imported(library: str, error: ImportError) -> str:
    """The sentence about an import that fails, which names what is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name == library:
        return f"{library} is not installed: pip install '{library}>={TESTED[library].oldest}'"
    return f"slidesparse uses what {library} {installed(library)} does not have ({error}): {_remedy(library)}"


def _remedy(library: str) -> str:
    known = TESTED[library]
    tested = known.oldest if known.oldest == known.newest else f"{known.oldest} to {known.newest}"
    return f"install {library} {tested}, with which it was tested, or a newer slidesparse"


def installed(library: str) -> str:
    """The version installed; "of unknown version" where no package tells."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def check_vllm(version: str) -> None:
    """Refuse a vLLM whose interfaces differ from those that are used here; one without a number, built from its sources, may pass.

    Raises:
        UnsupportedError: the version is older than the oldest tested.
    """
    oldest = TESTED["vllm"].oldest
    if (0, 0) < numbers(version) < numbers(oldest):
        raise UnsupportedError(f"slidesparse serves models with vLLM {oldest} or newer, this is {version}: pip install 'slidesparse[vllm]'")
