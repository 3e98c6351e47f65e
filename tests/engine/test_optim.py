from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitscale.config.schema import Optimizer
from vitscale.engine.optim import Run, ScaledAdamW, fill_state, make_optimizer, scaled_runs
from vitscale.engine.zero_state import Fragment


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Conv2d(1, 2, 2))
    decayed, plain = make_optimizer(model, Optimizer(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert (decayed["name"], plain["name"]) == ("decayed", "undecayed")
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4), (2, 1, 2, 2)]
    assert all(p.ndim == 1 for p in plain["params"])


def test_a_step_is_the_same_on_any_number_of_cores() -> None:
    """Ranks of different cores hold the same weights, to the bit; a step is divided among a rank's cores."""
    threads, stepped = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            torch.manual_seed(0)
            weight = nn.Parameter(torch.randn(200_003))
            optimizer = make_optimizer(nn.ParameterList([weight]), Optimizer())
            optimizer.param_groups[0]["lr"] = 0.1
            for _ in range(3):
                weight.grad = torch.randn(200_003)
                optimizer.step()
            stepped.append(weight.detach())
    finally:
        torch.set_num_threads(threads)
    assert optimizer.param_groups[0]["fused"]
    assert torch.equal(stepped[0], stepped[1])
    assert torch.equal(stepped[0], stepped[2])


def test_named_parameters_are_exempt_from_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    decayed, plain = make_optimizer(model, Optimizer(), undecayed={"1.weight"}).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4)]
    assert [tuple(p.shape) for p in plain["params"]] == [(3,), (2, 3), (2,)]


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    decayed, plain = make_optimizer(model, Optimizer()).param_groups
    assert [*decayed["params"], *plain["params"]] == [model[1].weight, model[1].bias]


def test_no_empty_group() -> None:
    assert len(make_optimizer(nn.Linear(4, 3, bias=False), Optimizer()).param_groups) == 1


@pytest.mark.parametrize(
    ("scales", "kind"),
    [({}, torch.optim.AdamW), ({"weight": 1.0}, torch.optim.AdamW), ({"weight": 0.5, "bias": 1.0}, ScaledAdamW)],
)
def test_rates_that_are_all_the_same_need_nothing_of_ours(scales: dict[str, float], kind: type) -> None:
    assert type(make_optimizer(nn.Linear(4, 3), Optimizer(), lr_scales=scales)) is kind


def test_a_scale_of_no_parameter() -> None:
    with pytest.raises(AssertionError, match="heads"):
        make_optimizer(nn.Linear(4, 3), Optimizer(), lr_scales={"heads": 0.5})


PARTS = st.tuples(st.integers(1, 5), st.sampled_from([0.5, 1.0, None]), st.sampled_from([0, 0, 3]))


@given(st.lists(PARTS, min_size=1, max_size=8), st.randoms())
def test_runs_are_the_scales_of_every_element(parts: list[tuple[int, float | None, int]], chance: object) -> None:
    """Each element of a flat is in one run with its parameter's scale, padding in none; no two runs could be one."""
    flat = torch.zeros(sum(count + padding for count, _, padding in parts))
    fragments, expected = [], []
    for number, (count, scale, padding) in enumerate(parts):
        fragments.append(Fragment(f"p{number}", (count,), 0, flat, len(expected), count))
        expected += [scale or 1.0] * count + [None] * padding
    chance.shuffle(fragments)  # type: ignore[attr-defined]
    scales = {f"p{number}": scale for number, (_, scale, _) in enumerate(parts) if scale is not None}
    runs = scaled_runs(fragments, scales)
    if not {*expected} - {1.0, None}:
        assert runs == {}
        return
    covered: list[float | None] = [None] * len(expected)
    for run in runs[flat]:
        assert covered[run.start : run.start + run.count] == [None] * run.count
        covered[run.start : run.start + run.count] = [run.scale] * run.count
    assert covered == expected
    for one, other in itertools.pairwise(runs[flat]):
        assert one.scale != other.scale or one.start + one.count < other.start


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_flat_steps_as_its_parameters_would(device: str) -> None:
    """Two parameters and padding in one tensor, each at its own rate: as in two tensors, and one step counted.

    A tensor without runs is stepped whole, one without a gradient not at all.
    """
    torch.manual_seed(0)
    values, gradients = torch.randn(8, device=device), [torch.randn(8, device=device) for _ in range(3)]
    apart = [nn.Parameter(values[:3].clone()), nn.Parameter(values[3:6].clone())]
    rates = {"lr": 0.1, "weight_decay": 0.3, "betas": (0.6, 0.8), "eps": 0.1, "fused": True}
    expected = torch.optim.AdamW([{"params": [apart[0]]}, {"params": [apart[1]], "lr": 0.1 * 0.25}], **rates)
    flat, whole, still = nn.Parameter(values.clone()), nn.Parameter(values[:3].clone()), nn.Parameter(values.clone())
    optimizer = ScaledAdamW([{"params": [flat, whole, still]}], **rates)
    fill_state(optimizer, [flat, whole, still])
    optimizer.runs = {flat: [Run(1.0, 0, 3), Run(0.25, 3, 3)]}
    for gradient in gradients:
        flat.grad, whole.grad, apart[0].grad, apart[1].grad = gradient, gradient[:3], gradient[:3], gradient[3:6]
        optimizer.step()
        expected.step()
    torch.testing.assert_close(flat[:6], torch.cat(apart), rtol=1e-6, atol=0)
    torch.testing.assert_close(flat[6:], values[6:], rtol=0, atol=0)
    torch.testing.assert_close(whole, apart[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(still, values, rtol=0, atol=0)
    assert [float(optimizer.state[tensor]["step"]) for tensor in (flat, whole, still)] == [3, 3, 0]


def test_state_made_by_hand_is_what_adamw_makes() -> None:
    """The first steps are the same, bit by bit, as with the state that AdamW makes lazily."""
    results = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        optimizer = make_optimizer(model, Optimizer())
        if by_hand:
            fill_state(optimizer, list(model.parameters()))
        for _ in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    for lazy, filled in zip(*results, strict=True):
        torch.testing.assert_close(lazy, filled, rtol=0, atol=0)
