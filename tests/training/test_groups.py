from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fieldmark.errors import ConfigError
from fieldmark.training.optim import create_optimizer, optimizer_names, parameter_groups


def make_stages(sizes=(2, 3, 1)):
    """One matrix and one bias per place, named by stage."""
    return [
        [
            item
            for place in range(size)
            for item in (
                (f"{number}.{place}.weight", nn.Parameter(torch.ones(2, 2))),
                (f"{number}.{place}.bias", nn.Parameter(torch.ones(2))),
            )
        ]
        for number, size in enumerate(sizes)
    ]


def make_groups(stages, **changes):
    settings = {
        "lr": 1e-2,
        "backbone_lr_scale": 0.1,
        "layer_decay": 0.5,
        "weight_decay": 0.05,
        "decay_norms_and_biases": False,
        "no_weight_decay": set(),
    }
    return parameter_groups(stages, **{**settings, **changes})


@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    frozen=st.sets(st.integers(0, 40)),
    all_decay=st.booleans(),
)
def test_every_trainable_parameter_is_in_exactly_one_group(sizes, frozen, all_decay):
    stages = make_stages([*sizes, 1])
    flat = [parameter for stage in stages for _, parameter in stage]
    for number, parameter in enumerate(flat[:-1]):
        parameter.requires_grad_(number not in frozen)
    groups = make_groups(stages, decay_norms_and_biases=all_decay)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in flat if p.requires_grad)
    assert len({group["name"] for group in groups}) == len(groups)
    assert all(group["params"] for group in groups)


def test_rates_fall_stage_by_stage_towards_the_input():
    rates = {group["name"]: group["lr"] for group in make_groups(make_stages((1, 1, 1, 1)))}
    expected = {"head": 1e-2, "stage2": 1e-3, "stage1": 5e-4, "stage0": 2.5e-4}
    assert rates == pytest.approx({f"{k}.{s}": v for k, v in expected.items() for s in ("decay", "no_decay")})


def test_the_schedule_finds_the_peak_rate_in_each_group():
    assert all(group["base_lr"] == group["lr"] for group in make_groups(make_stages()))


def test_biases_norms_and_exempt_names_are_not_decayed_unless_all_are():
    stages = [[("pos_embed", nn.Parameter(torch.ones(1, 2, 2))), *make_stages((1,))[0]], *make_stages((1,))]
    decay = {id(p): g["weight_decay"] for g in make_groups(stages, no_weight_decay={"pos_embed"}) for p in g["params"]}
    assert [decay[id(p)] for _, p in stages[0]] == [0.0, 0.05, 0.0]
    all_of_them = make_groups(stages, no_weight_decay={"pos_embed"}, decay_norms_and_biases=True)
    assert {group["weight_decay"] for group in all_of_them} == {0.05}


def test_nothing_to_learn_is_an_error():
    stages = make_stages((1,))
    for _, parameter in stages[0]:
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing would be trained: freeze fewer stages"):
        make_groups(stages)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "nadamw", "rmsprop"])
def test_optimizers_keep_the_groups_and_lower_a_loss(name):
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
    groups = make_groups([[("w", weight), ("b", bias)]], lr=1e-2)
    optimizer = create_optimizer(name, groups, use_fused=False)
    assert [group["name"] for group in optimizer.param_groups] == ["head.decay", "head.no_decay"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    losses = []
    for _ in range(20):
        loss = weight.square().sum() + bias.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("name", "settings"), [("adamw", {}), ("sgd", {"momentum": 0.9, "nesterov": True})])
def test_the_fused_update_equals_torchs_plain_one(name, settings):
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5, 5))
        groups = make_groups([[("w", weight)]])
        optimizer = create_optimizer(name, groups, use_fused=fused)
        assert bool(optimizer.defaults.get("fused")) is fused
        assert {key: optimizer.defaults[key] for key in settings} == settings
        for _ in range(5):
            weight.grad = weight.detach() * 0.3 + 1
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)


def test_an_unknown_optimizer_is_named_with_close_matches():
    with pytest.raises(ConfigError, match=r"optim.name: there is no optimizer 'adammw'; did you mean 'adamw' or"):
        create_optimizer("adammw", make_groups(make_stages()), use_fused=False)


def test_optimizers_that_cannot_run_here_are_not_offered():
    names = optimizer_names()
    assert {"adamw", "sgd", "lamb"} <= set(names)
    assert not [name for name in names if name.startswith(("bnb", "fused", "adahessian"))]
