"""A model spread over devices by transformers leaves room for the copies that packed layers run."""

from __future__ import annotations

import pytest
from torch import nn

from slidesparse.format import SCHEMES, PackedConfig
from slidesparse.integrations.transformers import SlideSparseConfig, SlideSparseQuantizer
from slidesparse.nn import SlideSparseLinear
from slidesparse.pattern import Pattern

accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize(("scheme", "pattern"), [("int8", "6:8"), ("int8", "2:4"), ("fp8", "6:8"), ("bf16", "4:6"), ("nvfp4", "6:8x2")])
def test_what_is_put_on_a_gpu_fits_when_it_runs(scheme: str, pattern: str) -> None:
    parsed, n, k = Pattern.parse(pattern), 192, 384
    model = nn.Sequential(*(SlideSparseLinear(k, n, False, pattern=parsed, scheme=scheme, device="meta") for _ in range(40)))
    quantizer = SlideSparseQuantizer(SlideSparseConfig(**PackedConfig(parsed, SCHEMES[scheme]).to_dict()), pre_quantized=True)
    copy = n * k * (1 if SCHEMES[scheme].dynamic else 2)

    def on_the_gpu(room: dict[int | str, int | str]) -> int:
        found = accelerate.infer_auto_device_map(model, max_memory=room)
        return sum(found.get(name, found.get("")) == 0 for name, _ in model.named_children())

    room: dict[int | str, int | str] = {0: 20 * copy + copy // 2, "cpu": 1 << 40}
    assert on_the_gpu(room) > 20, "the packed weights of more layers would fit, but not their copies"
    assert 15 <= on_the_gpu(quantizer.adjust_max_memory(room)) <= 20
    assert quantizer.adjust_max_memory({"cpu": 5, 0: "3GB"}) == {"cpu": 5, 0: "3GB"}
