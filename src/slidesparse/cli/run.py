"""generate: run a model, packed or dense, through transformers; and the options of every command that runs one."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.markup import escape

from ..errors import first_line
from . import screen
from .produce import Json, Model, Trust


class Memory(StrEnum):
    """Names of `slidesparse.gemm.MEMORY`, here so that --help needs no torch."""

    fast = "fast"
    lean = "lean"


DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
MemoryOption = Annotated[Memory, typer.Option(help="fast keeps the weights in the layouts that run best, lean only the packed ones.")]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    device: DeviceOption = "auto",
    memory: MemoryOption = Memory.fast,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Continue a prompt."""
    from ..evaluate import complete
    from ..integrations.conversion import hide_progress_bars
    from ..integrations.transformers import load

    hide_progress_bars()  # the status line is ours

    with screen.stdout_on_stderr(), screen.err.status(f"loading {escape(str(model))}"):
        network, tokenizer = load(model, device=checked_device(device), memory=memory, trust_remote_code=trust_remote_code)
    with screen.stdout_on_stderr(), screen.err.status("generating"):
        text = complete(network, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, chat=chat, seed=seed)
    if json:
        screen.print_json({"model": str(model), "prompt": prompt, "text": text})
    else:
        print(text if chat else prompt + text)


def checked_device(name: str) -> str:
    """The name itself, if there is such a device here."""
    import torch

    if name != "auto":
        try:
            torch.device(name)
        except RuntimeError as error:
            raise screen.UsageError(f"--device {name}: choose auto, cpu, cuda or cuda:N") from error
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name} cannot be used here: {first_line(error)}") from error
    return name
