"""What needs no GPU of engine/graphs.py: a block with other tensors in the place of its parameters; what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.config.check import check_config
from vitscale.engine.backend import Backend
from vitscale.engine.graphs import _gradients, _leaves, _Own
from vitscale.errors import ConfigError
from vitscale.models.auto import new_model
from vitscale.world import World


@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_runs_on_leaves_in_the_memory_of_its_parameters(compiled: bool) -> None:
    model = new_model(small_config("classification"), 0).train()
    if compiled:
        model.compile_blocks()
    block = model.blocks()[0]
    x, scale = torch.randn(2, 17, 32, requires_grad=True), torch.ones(2, 2)
    leaves = _leaves(block)
    with torch.autocast("cpu", torch.bfloat16):
        output = functional_call(_Own(block, block.forward), leaves, (x, scale, None))
        expected = block(x, scale)
    gradients = _gradients(output, [x, scale, *leaves.values()])
    of_block = torch.autograd.grad(expected, [x, *block.parameters()], torch.ones_like(expected))
    assert torch.equal(output, expected)
    assert gradients.pop(1) is None  # of the scales
    assert all(torch.equal(a, b) for a, b in zip(gradients, of_block, strict=True))
    assert [leaf.data_ptr() for leaf in leaves.values()] == [p.data_ptr() for p in block.parameters()]
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.parametrize(("section", "keys"), [
    ("parallel", {"zero_stage": 3}), ("train", {"gradient_checkpointing": True}), ("train", {"freeze": 1})
])  # fmt: skip
def test_what_graphs_cannot_do_is_refused(section: str, keys: dict[str, object]) -> None:
    config = small_config("mae")
    config = replace(config, train=replace(config.train, cuda_graphs=True))
    config = replace(config, **{section: replace(getattr(config, section), **keys)})
    with pytest.raises(ConfigError, match=f"cannot be beside {section}.{next(iter(keys))}"):
        check_config(config, World())


@pytest.mark.usefixtures("single_rank")
def test_on_a_cpu_they_are_refused() -> None:
    config = small_config("mae")
    config = replace(config, train=replace(config.train, cuda_graphs=True))
    backend = Backend(config, World())
    try:
        with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
            backend.wrap(new_model(config, 0), config)
    finally:
        backend.close()
