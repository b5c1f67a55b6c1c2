"""Compiled kernels are found again only where Triton would have compiled the same one, and producers give them their outputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from slidesparse.ops import launch
from slidesparse.ops.launch import Launch, Producer


class Compiled:
    function, packed_metadata = 7, ("metadata",)

    def __init__(self, log: list) -> None:
        self.log = log

    def run(self, *arguments) -> None:
        self.log.append(arguments)


class Kernel:
    arg_names = ("x", "bias", "m", "k", "BLOCK", "INT8")

    def __init__(self, compiles: bool = True) -> None:
        self.compiles, self.compiled, self.direct = compiles, [], []

    def __getitem__(self, grid: tuple):
        def run(*arguments, **constants):
            self.compiled.append((grid, arguments, constants))
            return Compiled(self.direct) if self.compiles else None

        return run


@pytest.fixture(autouse=True)
def stream(monkeypatch) -> None:
    monkeypatch.setattr(launch, "current_stream", lambda device: ("stream of", device))


CONSTANTS = {"INT8": True, "num_warps": 4, "BLOCK": 32}


def test_the_second_call_goes_straight_to_the_compiled_kernel_with_addresses():
    kernel, x, y = Kernel(), torch.zeros(64, dtype=torch.int8), torch.zeros(64, dtype=torch.int8)
    call = Launch(kernel, (5, 2), (48, 1), CONSTANTS)
    call(x, None)
    call(y, None)
    assert kernel.compiled == [((5, 2, 1), (x, None, 48, 1), CONSTANTS)]
    assert kernel.direct == [(5, 2, 1, ("stream of", -1), 7, ("metadata",), None, None, None, y.data_ptr(), None, 48, 1, 32, True)]


def test_another_alignment_compiles_anew_and_both_are_kept():
    kernel, x = Kernel(), torch.zeros(64, dtype=torch.int8)
    call = Launch(kernel, (1,), (48, 2), CONSTANTS)
    for tensor in (x, x[1:], x[16:], x[2:]):
        call(tensor, None)
    call(x, x)
    assert [arguments[0].data_ptr() - x.data_ptr() for _, arguments, _ in kernel.compiled] == [0, 1, 0]
    assert len(kernel.direct) == 2


def test_another_number_that_compiles_to_the_same_goes_straight_to_what_was_compiled():
    kernel, x = Kernel(), torch.zeros(64, dtype=torch.int8)
    for m in (32, 48, 33, 1, 35, 1 << 31, (1 << 31) + 16):
        Launch(kernel, (m,), (m, 2), CONSTANTS)(x, None)
    assert [arguments[2] for _, arguments, _ in kernel.compiled] == [32, 33, 1, 1 << 31]
    assert [(call[0], call[11]) for call in kernel.direct] == [(48, 48), (35, 35), ((1 << 31) + 16,) * 2]


@pytest.mark.parametrize(
    "other",
    [
        lambda kernel, x: Launch(Kernel(), (1,), (32, 2), CONSTANTS)(x, None),
        lambda kernel, x: Launch(kernel, (1,), (32, 2), CONSTANTS | {"BLOCK": 64})(x, None),
        lambda kernel, x: Launch(kernel, (1,), (32, 2.0), CONSTANTS)(x, None),
        lambda kernel, x: Launch(kernel, (1,), (32, 2), CONSTANTS)(x.view(torch.int32), None),
        lambda kernel, x: Launch(kernel, (1,), (32, 2), CONSTANTS)(x, x),
        lambda kernel, x: Launch(kernel, (1,), (32, 2), CONSTANTS)(x[1:], None),
    ],
    ids=["kernel", "constant", "kind of number", "type", "presence", "alignment"],
)
def test_what_compiles_to_something_else_is_not_shared(other):
    kernel, x = Kernel(), torch.zeros(64, dtype=torch.int8)
    Launch(kernel, (1,), (32, 2), CONSTANTS)(x, None)
    other(kernel, x)
    assert not kernel.direct


def test_descriptors_pass_through():
    kernel, descriptor, x = Kernel(), object(), torch.zeros(16, dtype=torch.int8)
    call = Launch(kernel, (1,), (48, 2), CONSTANTS)
    call(descriptor, x)
    call(descriptor, x)
    assert kernel.direct[0][9:11] == (descriptor, x.data_ptr())


def test_a_tensor_of_another_device_goes_to_triton_which_refuses_it():
    class Elsewhere(torch.Tensor):
        def get_device(self) -> int:
            return 3

    kernel, x = Kernel(), torch.zeros(64, dtype=torch.int8)
    call = Launch(kernel, (1,), (48, 2), CONSTANTS)
    call(x, x)
    call(x, x.as_subclass(Elsewhere))
    assert len(kernel.compiled) == 2 and not kernel.direct


def test_nothing_is_kept_of_an_interpreter():
    kernel, x = Kernel(compiles=False), torch.zeros(64, dtype=torch.int8)
    call = Launch(kernel, (1,), (48, 2), CONSTANTS)
    call(x, None)
    call(x, None)
    assert len(kernel.compiled) == 2 and not kernel.direct


CPU = torch.device("cpu")


def fill(*tensors) -> None:
    """Stands for a kernel that writes one number into every tensor but the first."""
    for tensor in tensors[1:]:
        tensor.fill_(tensors[0])


def test_a_producer_gives_its_only_output_of_the_size_strides_and_type_asked_for():
    y = Producer(fill, CPU, (((3, 4), (8, 1), torch.bfloat16),))(7)
    assert isinstance(y, torch.Tensor) and y.dtype == torch.bfloat16 and y.stride() == (8, 1)
    assert y.tolist() == [[7.0] * 4] * 3


def test_a_producer_gives_several_outputs_fresh_in_every_call():
    produce = Producer(fill, CPU, (((2, 3), (3, 1), torch.int8), ((2, 1), (1, 1), torch.float32)))
    first, second = produce(5), produce(6)
    assert [(tuple(one.shape), one.dtype, one.unique().tolist()) for one in first] == [
        ((2, 3), torch.int8, [5]),
        ((2, 1), torch.float32, [5]),
    ]
    assert all(one.unique().tolist() == [6] and one.data_ptr() != other.data_ptr() for one, other in zip(second, first, strict=True))


@pytest.mark.parametrize("at", [None, 0, 1, 2])
def test_outputs_stand_where_the_function_wants_them(at):
    seen = []
    output = Producer(lambda *arguments: seen.extend(arguments), CPU, (((1,), (1,), torch.int8),), at=at)("a", "b")
    place = 2 if at is None else at
    assert seen.pop(place) is output and seen == ["a", "b"]
