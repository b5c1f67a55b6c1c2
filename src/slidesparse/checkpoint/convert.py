"""The streaming conversion: shard by shard, block by block, in memory that does not grow with the model."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import CheckpointError, UnsupportedError
from ..format import VERSION
from .configs import FindReader, Reader, check_shapes, contradictions, of_class, output_config, unplaced_of
from .formats import find_layers
from .norms import NORMS, write_norms
from .recipe import RECONSTRUCTION, LayerPlan, Recipe, plan_layers
from .solved import REPORT, Job, PruningReport, Solver, read_report, remove_blocks, solved_bytes, solved_norms, with_solved
from .source import INDEX, Checkpoint
from .staging import Staging, write_json
from .tensorfile import DTYPE_NAMES, TensorInfo, TensorReader, TensorWriter, read_header
from .transform import detect_pattern, output_specs, transform

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is being worked on."""

_COPY_BYTES = 8 << 20
_Shape = tuple[str, tuple[int, ...], int]


@dataclass(frozen=True)
class ConvertedLayer:
    """One line of a `ConversionReport`."""

    name: str
    n: int
    k: int
    scheme: str
    pattern: str
    bytes_in: int
    bytes_out: int


@dataclass
class ConversionReport:
    """What a conversion did; bytes are those of all tensors, ``kept_dense`` names linear-shaped layers left alone.

    ``pruning`` says how a calibrated method went, ``left_out`` names files and folders of the source that hold weights and were not read,
    ``unplaced`` tensors that the class of model has no place for: they go along as they are; ``missing`` those that it asks for and the
    source lacks.
    """

    out: Path
    bytes_in: int
    bytes_out: int
    layers: list[ConvertedLayer]
    kept_dense: list[str] = field(default_factory=list)
    resumed_shards: int = 0
    pruning: PruningReport | None = None
    left_out: list[str] = field(default_factory=list)
    unplaced: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    solver: Solver | None = None,
    find_reader: FindReader | None = None,
) -> ConversionReport:
    """Convert a checkpoint directory to another, streaming: prune, quantise and store as the recipe says.

    Peak memory is a few blocks of rows, whatever the model's size. ``out`` appears whole or not at all; an interrupted run leaves
    ``out.incomplete``, which the same call resumes. ``device`` is where the arithmetic runs (``auto``: a GPU if there is one); the
    result is bitwise the same. Calibrated methods run the model: ``solver`` does, which `slidesparse.convert` brings along; its memory
    is that of the model on the host and of one block on the device, and its result depends on the kind of device. Before the output
    appears it is read back; ``find_reader`` brings along how other libraries read it, as `slidesparse.convert` does.

    Raises:
        CheckpointError: a source that cannot be read, an output that exists, a full or read-only disk.
        UnsupportedError: a recipe that does not fit the checkpoint, or a device that is not there.
        PatternError: weights that violate the pattern, by layer, row, group and values.
        WeightError: weights that hold NaN or Inf.
    """
    checkpoint = Checkpoint.open(source)
    read = find_reader(checkpoint.config, checkpoint.names) if find_reader else None
    if read is not None:
        check_shapes(checkpoint, read)
    plans = plan_layers(checkpoint, recipe, read.fixed if read else {}, read.heads if of_class(read) else checkpoint.of_vocabulary)
    if read is not None:
        _check_form(checkpoint, recipe, plans, read)
    device = _device(device, recipe)
    progress = progress or (lambda done, total, what: None)
    if recipe.calibrated and solver is None:
        raise UnsupportedError(f"{recipe.method} runs the model: call slidesparse.convert, which brings transformers")
    staging = Staging(Path(out), checkpoint.path, _job(checkpoint, recipe, device), overwrite)
    try:
        with staging, TensorReader() as reader:
            if solver is None or not recipe.calibrated:
                return _Conversion(checkpoint, recipe, plans, reader, device, progress).run(staging, read)
            pruning = read_report(staging.path)
            if pruning is None:
                _check_room(staging.path, _bytes_with_solved(checkpoint, recipe, plans) - staging.nbytes)
                pruning = solver(Job(checkpoint, recipe, tuple(plans), staging.path, device, progress))
                norms = solved_norms(plans, staging.path)
                write_norms(staging.path / NORMS, {layer: reader.read(info) for layer, info in norms.items()})
                # Last, since it tells a later run that nothing is left to solve.
                write_json(staging.path / REPORT, asdict(pruning))
            plans = with_solved(plans, staging.path)
            report = _Conversion(checkpoint, recipe, plans, reader, device, progress).run(staging, read)
            return replace(report, pruning=pruning)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"the disk of {staging.path} is full: free space and run the same command again to resume") from error
        raise CheckpointError(f"cannot write {staging.path}: {error.strerror or error}") from error


class _Conversion:
    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        plans: list[LayerPlan],
        reader: TensorReader,
        device: str,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.recipe, self.reader, self.device, self.progress = checkpoint, recipe, reader, device, progress
        scanned = [plan for plan in plans if plan.pattern is None] if recipe.obey else []
        self.total = checkpoint.nbytes + sum(plan.layer.main.nbytes for plan in scanned)
        self.done, self.what = 0, ""
        self.plans = {plan.layer.name: plan for plan in plans}
        self.plans |= {plan.layer.name: self._with_pattern(plan) for plan in scanned}
        left = [layer for layer in checkpoint.layers.values() if layer.restored and layer.name not in self.plans]
        written = [*self.plans.values(), *(LayerPlan(layer, layer.scheme, None) for layer in left)]
        self.plan_of = {info.name: plan for plan in written for info in plan.layer.tensors.values()}

    def run(self, staging: Staging, read: Reader | None) -> ConversionReport:
        shards = {name: self._outputs(tensors) for name, tensors in self.checkpoint.shards.items()}
        sizes = {name: sum(nbytes for _, _, nbytes in tensors.values()) for name, tensors in shards.items()}
        done = [name for name in shards if _finished(staging.path / name, shards[name])]
        _check_room(staging.path, sum(size for name, size in sizes.items() if name not in done))
        for name, tensors in self.checkpoint.shards.items():
            if name in done:
                self._advance(sum(info.nbytes for info in tensors.values()))
            else:
                self._write_shard(staging.path / name, tensors, shards[name])
        along, left = self.checkpoint.side_files()
        for file in along:
            if not (self.recipe.calibrated and file.name in (REPORT, NORMS)):  # of an earlier pruning: this one's are there
                _copy(file, staging.path / file.name)
        if (self.checkpoint.path / INDEX).exists():
            weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
            write_json(staging.path / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
        remove_blocks(staging.path)
        staging.commit(self._config(staging.path, read))
        report = self._report(staging.out, sum(sizes.values()), len(done), [file.name for file in left])
        missing = [] if read is None else list(read.missing)
        return replace(report, unplaced=list(unplaced_of(self.checkpoint, read)), missing=missing)

    def _config(self, path: Path, read: Reader | None) -> dict[str, Any]:
        """config.json of the finished files; both are read back as a reader would."""
        tensors = {name: info for shard in self.checkpoint.shards for name, info in read_header(path / shard)[0].items()}
        plans = list(self.plans.values())
        config = output_config(self.checkpoint, self.recipe, plans, tensors, read)
        found, wrong = find_layers(path, config, tensors), contradictions(config, tensors, read)
        for plan in plans:
            layer, packed = found.get(plan.layer.name), self.recipe.form == "packed"
            told = (plan.layer.n, plan.layer.k, plan.scheme, plan.pattern if packed else None)
            if layer is None or (layer.n, layer.k, layer.scheme, layer.pattern) != told:
                wrong.append(f"layer {plan.layer.name} would not be read as it was written")
        if wrong:
            raise CheckpointError(f"{path} is not what its config.json would say, so it is not finished: {wrong[0]}")
        return config

    def _with_pattern(self, plan: LayerPlan) -> LayerPlan:
        self.what = f"detecting the pattern of {plan.layer.name}"
        return replace(plan, pattern=detect_pattern(self.reader, plan.layer, self._advance, unit=2 if plan.scheme.pair else 1))

    def _outputs(self, tensors: dict[str, TensorInfo]) -> dict[str, _Shape]:
        """Tensors of an output shard: a converted layer's stand where its weights stood."""
        outputs: dict[str, _Shape] = {}
        for name, info in tensors.items():
            plan = self.plan_of.get(name)
            if plan is None:
                outputs[name] = (info.dtype_name, info.shape, info.nbytes)
            elif info is plan.layer.main:
                for spec in output_specs(plan, self.recipe):
                    outputs[f"{plan.layer.name}.{spec.suffix}"] = (DTYPE_NAMES[spec.dtype], spec.shape, spec.nbytes)
        return outputs

    def _write_shard(self, path: Path, tensors: dict[str, TensorInfo], outputs: dict[str, _Shape]) -> None:
        with TensorWriter(path, outputs) as writer:
            for name, info in tensors.items():
                plan = self.plan_of.get(name)
                self.what = plan.layer.name if plan else name
                if plan is None:
                    for offset in range(0, info.nbytes, _COPY_BYTES):
                        size = min(_COPY_BYTES, info.nbytes - offset)
                        self._advance(writer.write(name, offset, self.reader.read_bytes(info, offset, size)))
                elif info is plan.layer.main:
                    for part, first, rows in transform(self.reader, plan, self.recipe, self._advance, self.device):
                        target = f"{plan.layer.name}.{part}"
                        row_bytes = outputs[target][2] // max(outputs[target][1][0], 1)
                        writer.write(target, first * row_bytes, rows.cpu())

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(min(self.done, self.total), self.total, self.what)

    def _report(self, out: Path, bytes_out: int, resumed: int, left_out: list[str]) -> ConversionReport:
        layers = []
        for plan in self.plans.values():
            layer, pattern, size = plan.layer, str(plan.pattern or "none"), _output_bytes(plan, self.recipe)
            layers.append(ConvertedLayer(layer.name, layer.n, layer.k, plan.scheme.name, pattern, layer.nbytes, size))
        kept = [name for name in self.checkpoint.layers if name not in self.plans]
        self.progress(self.total, self.total, "done")
        return ConversionReport(out, self.checkpoint.nbytes, bytes_out, layers, kept, resumed, left_out=left_out)


def _copy(source: Path, target: Path) -> None:
    """Copy a side file or folder; what a link points to, not the link."""
    try:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, target)
    except shutil.Error as error:
        raise CheckpointError(f"cannot copy {error.args[0][0][0]}: {error.args[0][0][2]}") from error
    except OSError as error:
        if error.filename != str(source):
            raise
        raise CheckpointError(f"cannot read {source}: {error.strerror}") from error


def _check_form(checkpoint: Checkpoint, recipe: Recipe, plans: list[LayerPlan], read: Reader) -> None:
    """Whether what transformers reads can be written in the form that the recipe asks for.

    Raises:
        CheckpointError: a tensor is missing without which a packed model cannot be loaded.
        UnsupportedError: quantised dense weights beside experts in one tensor.
    """
    if read.missing and recipe.form == "packed":
        raise CheckpointError(f"{checkpoint.path}: tensor {read.missing[0]} is missing, without which the model cannot be loaded packed")
    if read.split and recipe.form == "dense" and any(plan.scheme.dynamic or plan.scheme.pair for plan in plans):
        raise UnsupportedError(
            f"{checkpoint.path}: {read.split[0]} holds its experts in one tensor, which transformers does not read beside quantised "
            "layers: keep the weights in 16 bits, or store them packed (slidesparse convert)"
        )


def _device(name: str, recipe: Recipe) -> str:
    """The device to compute on. Random choices are drawn block by block, so they stay with the CPU's blocks."""
    if name not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise UnsupportedError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= gpus:
        raise UnsupportedError(f"device {name} asked for, but torch sees {gpus} GPUs: use cpu")
    if recipe.method == "random" or gpus == 0:
        return "cpu"
    return "cuda" if name == "auto" else name


def _output_bytes(plan: LayerPlan, recipe: Recipe) -> int:
    return sum(spec.nbytes for spec in output_specs(plan, recipe))


def _bytes_with_solved(checkpoint: Checkpoint, recipe: Recipe, plans: list[LayerPlan]) -> int:
    """What a calibrated conversion takes on disk before its solved blocks are removed."""
    rest = checkpoint.nbytes - sum(plan.layer.nbytes for plan in plans)
    return rest + sum(solved_bytes(plan) + _output_bytes(plan, recipe) for plan in plans)


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if needed > free:
        room = f"needs {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free"
        raise CheckpointError(f"{path} {room}: free some, or choose another disk")


def _finished(path: Path, tensors: dict[str, _Shape]) -> bool:
    """Whether an earlier run of the same job already wrote this shard: only whole files have its name."""
    if not path.exists():
        return False
    found, _ = read_header(path)
    return {name: (info.dtype_name, info.shape, info.nbytes) for name, info in found.items()} == tensors


def _job(checkpoint: Checkpoint, recipe: Recipe, device: str) -> dict[str, Any]:
    """What makes two runs the same job: source files, recipe and format."""
    stats = {name: (checkpoint.path / name).stat() for name in checkpoint.shards}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return {
        "version": VERSION,
        "library": __version__,
        "source": str(checkpoint.path.resolve()),
        "files": files,
        "config": checkpoint.config,
        "recipe": recipe.to_dict(),
        "reconstruction": RECONSTRUCTION if recipe.calibrated and recipe.corrects else None,
        # Calibrated methods choose by sums, which differ in their last bits from one kind of device to another.
        "device": device.partition(":")[0] if recipe.calibrated else None,
    }
