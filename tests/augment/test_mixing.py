from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fieldmark.augment.mixing import MixSpec, apply_mix, draw_mix, lambda_draws, one_hot
from fieldmark.augment.sample import MIX, uniforms

SPEC = MixSpec(share=0.8, cutmix_share=0.5, mixup_alpha=(0.4, 0.6), cutmix_alpha=(0.8, 1.2))
BATCHES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "epoch": st.integers(0, 500),
        "step": st.integers(0, 10**6),
        "batch_size": st.integers(1, 9),
        "image_size": st.integers(1, 33),
    }
)


def kinds(spec: MixSpec, count: int) -> dict[str, float]:
    drawn = [draw_mix(spec, seed=0, epoch=0, step=step, batch_size=2, image_size=8).kind for step in range(count)]
    return {kind: drawn.count(kind) / count for kind in ("none", "mixup", "cutmix")}


@pytest.mark.parametrize(("share", "cutmix_share"), [(0.0, 0.5), (0.4, 0.5), (0.8, 0.25), (1.0, 0.5), (0.6, 0.0)])
def test_the_shares_are_of_all_batches_and_of_the_mixed_ones(share, cutmix_share):
    shares = kinds(replace(SPEC, share=share, cutmix_share=cutmix_share), 1500)
    assert shares["mixup"] == pytest.approx(share * (1 - cutmix_share), abs=0.05)
    assert shares["cutmix"] == pytest.approx(share * cutmix_share, abs=0.05)
    assert shares["none"] == pytest.approx(1 - share, abs=0.05)
    assert share != 1 or shares["none"] == 0


@pytest.mark.parametrize("methods", [("mixup", "cutmix"), ("cutmix",), ("mixup",)])
@pytest.mark.parametrize("prob", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_shares_draw_what_a_probability_per_method_drew(prob, methods):
    share, cutmix_share = prob * len(methods), methods.count("cutmix") / len(methods)
    spec = replace(SPEC, share=share, cutmix_share=cutmix_share)
    for step in range(400):
        u = float(uniforms(0, 3, [step], stream=MIX, count=1)[0, 0])
        place = int(u / prob)
        drawn = draw_mix(spec, seed=0, epoch=3, step=step, batch_size=2, image_size=8)
        assert drawn.kind == (methods[place] if place < len(methods) else "none")


def test_one_method_may_take_every_batch():
    assert kinds(replace(SPEC, share=1.0, cutmix_share=1.0), 50)["cutmix"] == 1.0


@settings(deadline=None)
@given(batch=BATCHES, num_classes=st.integers(1, 7), smoothing=st.sampled_from([0.0, 0.1]))
def test_targets_stay_distributions_and_shapes_stay(batch, num_classes, smoothing):
    images = torch.rand(batch["batch_size"], 3, batch["image_size"], batch["image_size"])
    targets = one_hot(torch.arange(batch["batch_size"]) % num_classes, num_classes, smoothing)
    mix = draw_mix(replace(SPEC, share=1.0), **batch)
    mixed, blended = apply_mix(images, targets, mix)
    assert mixed.shape == images.shape
    assert mixed.dtype == images.dtype
    assert torch.allclose(blended.sum(dim=1), torch.ones(len(blended)), atol=1e-6)
    assert blended.min() >= 0
    assert sorted(mix.partners.tolist()) == list(range(batch["batch_size"]))
    assert 0 <= mix.lam <= 1


@settings(deadline=None)
@given(batch=BATCHES)
def test_cutmix_lambda_is_exactly_the_share_of_pixels_kept(batch):
    mix = draw_mix(replace(SPEC, share=1.0, cutmix_share=1.0), **batch)
    size, count = batch["image_size"], batch["batch_size"]
    images = torch.arange(count).float()[:, None, None, None].expand(count, 1, size, size)
    mixed, targets = apply_mix(images, torch.eye(count), mix)
    for place, partner in enumerate(mix.partners.tolist()):
        kept = (mixed[place] == place).sum().item() / size**2
        assert kept == (1.0 if partner == place else mix.lam)
        if partner != place:
            assert targets[place, place].item() == pytest.approx(kept, abs=1e-6)


@settings(deadline=None)
@given(batch=BATCHES)
def test_mixup_blends_photos_and_targets_alike(batch):
    mix = draw_mix(replace(SPEC, share=1.0, cutmix_share=0.0), **batch)
    images = torch.rand(batch["batch_size"], 3, 4, 4)
    targets = torch.eye(batch["batch_size"])
    mixed, blended = apply_mix(images, targets, mix)
    assert torch.allclose(mixed, mix.lam * images + (1 - mix.lam) * images[mix.partners], atol=1e-6)
    assert torch.allclose(blended, mix.lam * targets + (1 - mix.lam) * targets[mix.partners], atol=1e-6)


def test_an_unmixed_batch_stays_as_it_is():
    mix = draw_mix(replace(SPEC, share=0.0), seed=0, epoch=0, step=0, batch_size=3, image_size=8)
    images, targets = torch.rand(3, 3, 8, 8), torch.eye(3)
    assert mix.lam == 1.0
    assert all(a is b for a, b in zip(apply_mix(images, targets, mix), (images, targets), strict=True))


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_mixing_leaves_its_arguments_alone(method):
    images, targets = torch.rand(4, 3, 8, 8), torch.eye(4)
    before = images.clone(), targets.clone()
    for step in range(5):
        mix = draw_mix(
            replace(SPEC, share=1.0, cutmix_share=float(method == "cutmix")),
            seed=0,
            epoch=0,
            step=step,
            batch_size=4,
            image_size=8,
        )
        apply_mix(images, targets, mix)
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])


def test_a_mix_depends_on_seed_epoch_and_step_alone():
    arguments = {"batch_size": 8, "image_size": 32}
    spec = replace(SPEC, share=1.0)
    first = draw_mix(spec, seed=1, epoch=2, step=3, **arguments)
    again = draw_mix(spec, seed=1, epoch=2, step=3, **arguments)
    assert (first.kind, first.lam, first.box) == (again.kind, again.lam, again.box)
    assert np.array_equal(first.partners, again.partners)
    others = [draw_mix(spec, seed=s, epoch=e, step=t, **arguments) for s, e, t in [(0, 2, 3), (1, 0, 3), (1, 2, 4)]]
    assert all(other.lam != first.lam for other in others)


def test_mixup_lambda_follows_its_mixture_of_betas():
    rng = np.random.default_rng(0)
    expected = [rng.beta(alpha, alpha) for alpha in rng.uniform(0.4, 0.6, 4000)]
    drawn = lambda_draws(SPEC, "mixup", count=4000, seed=0, image_size=224)
    assert stats.ks_2samp(drawn, expected).pvalue > 0.01
    assert stats.ks_2samp(drawn, rng.beta(1.0, 1.0, 4000)).pvalue < 0.01


def test_cutmix_lambda_grows_by_clipping():
    drawn = lambda_draws(SPEC, "cutmix", count=4000, seed=0, image_size=224)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    # Half of the mass of Beta(1, 1) lies above 0.5; rectangles that stick out keep more.
    assert np.mean(drawn > 0.5) > 0.65


def test_equal_ends_fix_alpha():
    fixed = replace(SPEC, mixup_alpha=(1.0, 1.0))
    assert stats.kstest(lambda_draws(fixed, "mixup", count=2000, seed=0, image_size=8), "uniform").pvalue > 0.01


def test_one_hot_spreads_the_smoothing_over_all_classes():
    targets = one_hot(torch.tensor([2, 0]), 4, 0.1)
    assert targets[0].tolist() == pytest.approx([0.025, 0.025, 0.925, 0.025])
    assert one_hot(torch.tensor([2, 0]), 4, 0.0).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    logits = torch.randn(2, 4)
    theirs = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0]), label_smoothing=0.1)
    assert torch.nn.functional.cross_entropy(logits, targets).item() == pytest.approx(theirs.item(), abs=1e-6)
