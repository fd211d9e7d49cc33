from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from fieldmark.errors import ConfigError, WeightsError
from fieldmark.models.catalog import ALIASES, format_models, list_models, resolve_name
from fieldmark.models.classifier import (
    Classifier,
    check_parameter_budget,
    count_parameters,
    create_classifier,
    freeze_stages,
    require_size,
)

# One small network of each kind of layout that timm groups in its own way.
LAYOUTS = [
    "resnet10t",
    "test_efficientnet",
    "test_convnext",
    "test_vit",
    "mobilenetv3_small_050",
    "vgg11",
    "densenet121",
]


def make_classifier(name="resnet10t", device="cpu", **changes):
    settings = {
        "num_classes": 5,
        "head": "linear",
        "head_hidden": 1024,
        "head_dropout": 0.3,
        "feature_dropout": 0.0,
        "drop_path": 0.0,
        "stride_in_1x1": False,
    }
    with torch.device(device):
        return create_classifier(name, **{**settings, **changes})


@pytest.mark.parametrize(
    ("alias", "millions"),
    [
        ("resnet50", 25.71),
        ("resnext50", 25.18),
        ("resnet101", 44.70),
        ("resnext101", 44.33),
        ("resnext101-wide", 88.94),
        ("seresnext50", 27.71),
        ("seresnext101", 93.74),
    ],
)
def test_the_competitions_parameter_counts_are_reproduced(alias, millions):
    model = make_classifier(resolve_name(alias, "pretrained"), "meta", num_classes=100, head="mlp")
    assert round(count_parameters(model) / 1e6, 2) == millions


@pytest.mark.parametrize(
    "alias",
    [
        "resnet50",
        "resnext50",
        "seresnext50",
        *(
            pytest.param(alias, marks=pytest.mark.slow)
            for alias in ("resnet101", "resnext101", "resnext101-wide", "seresnext101")
        ),
    ],
)
def test_the_competitions_architectures_go_forward_and_backward(alias):
    model = make_classifier(resolve_name(alias, "random"), head="mlp")
    logits = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 5)
    nn.functional.cross_entropy(logits, torch.tensor([0, 3])).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    # One convolution at least in each stage is really reached. (A zero-initialised last norm of a residual branch
    # holds the gradient of its branch at zero in the first step.)
    for stage in model.stage_parameters():
        assert any(parameter.grad.abs().sum() > 0 for _, parameter in stage)


def test_the_mlp_head_is_exactly_the_competitions():
    model = make_classifier(head="mlp", head_dropout=0.3)
    assert [type(layer) for layer in model.head] == [nn.Linear, nn.Dropout, nn.ReLU, nn.Linear]
    assert model.head[0].out_features == 1024
    assert model.head[1].p == 0.3


def test_logits_are_the_head_on_the_features():
    model = make_classifier(feature_dropout=0.5).eval()
    images = torch.randn(2, 3, 64, 64)
    features = model.features(images)
    assert features.shape == (2, model.head.in_features)
    assert torch.equal(model(images), model.head(features))
    model.train()
    assert (model.feature_dropout(torch.ones(1000)) == 0).float().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_stages_hold_each_tensor_once_in_order_from_the_input_with_the_head_last(name):
    model = make_classifier(name, "meta")
    by_stage = model.stage_parameters()
    names = [name for stage in by_stage for name, _ in stage]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(by_stage) == model.count_stages() + 1 >= 4
    assert [name for name, _ in by_stage[-1]] == ["head.weight", "head.bias"]
    first = next(name for name, _ in model.named_parameters())
    assert first in [name for name, _ in by_stage[0]]


def test_the_stages_of_a_resnet_are_stem_and_layers():
    model = make_classifier("resnet10t", "meta")
    tops = [{name.split(".")[1] for name, _ in stage} for stage in model.stage_parameters()[:-1]]
    assert tops == [{"conv1", "bn1"}, {"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}]


def test_a_final_norm_belongs_to_the_last_stage_and_embeddings_to_the_first():
    model = make_classifier("test_vit", "meta")
    stages = [[name for name, _ in stage] for stage in model.stage_parameters()]
    assert {"backbone.cls_token", "backbone.pos_embed"} <= set(stages[0])
    assert any(name.startswith(("backbone.norm.", "backbone.fc_norm.")) for name in stages[-2])
    assert "backbone.pos_embed" in model.no_weight_decay()
    last = [name for name, _ in make_classifier("test_convnext", "meta").stage_parameters()[-2]]
    assert "backbone.head.norm.weight" in last
    assert any(name.startswith("backbone.stages.3.") for name in last)  # the norm is not a stage of its own


def _statistics(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "running_" in name}


def test_a_frozen_stage_keeps_weights_and_batchnorm_statistics_in_training_mode():
    model = make_classifier()
    freeze_stages(model, 3)
    model.train()
    before = _statistics(model)
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    changed = {
        name.split(".")[1] for name, tensor in _statistics(model).items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"layer3", "layer4"}
    learning = {
        name.split(".")[1] for name, p in model.backbone.named_parameters(prefix="backbone") if p.grad is not None
    }
    assert learning == {"layer3", "layer4"}
    assert all(parameter.requires_grad for parameter in model.head.parameters())


def test_frozen_batchnorm_keeps_its_statistics_while_its_weights_learn():
    model = make_classifier().eval()
    images = torch.randn(4, 3, 64, 64)
    expected = model.features(images)
    freeze_stages(model, 0, freeze_batchnorm=True)
    model.train()
    torch.testing.assert_close(model.features(images), expected)
    model(images).sum().backward()
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert all(not norm.training and norm.weight.grad is not None for norm in norms)
    assert all(norm.num_batches_tracked == 0 for norm in norms)
    assert model.training


def test_a_frozen_backbone_gives_the_same_features_in_training_mode_as_in_evaluation():
    model = make_classifier("test_efficientnet", drop_path=0.5)
    freeze_stages(model, "all")
    images = torch.randn(4, 3, 64, 64)
    assert torch.equal(model.train().features(images), model.eval().features(images))


def test_gradual_unfreezing_thaws_from_the_output_inwards():
    model = make_classifier()
    model.train()
    freeze_stages(model, "all")
    assert model.num_frozen_stages == 5
    for count in (4, 3, 0):
        freeze_stages(model, count)
        learning = [all(p.requires_grad for _, p in stage) for stage in model.stage_parameters()]
        assert learning == [False] * count + [True] * (6 - count)
        for stage, is_learning in zip(model.stage_parameters(), learning, strict=True):
            owners = [model.get_submodule(name.rpartition(".")[0]) for name, _ in stage]
            assert all(owner.training == is_learning for owner in owners)


def test_freezing_more_stages_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match=r"model.freeze: resnet10t has 5 stages with its stem; got 6. Give 0 to 5"):
        freeze_stages(make_classifier(device="meta"), 6)


def test_stride_moves_into_the_first_convolution_of_a_resnet():
    plain, original = make_classifier("resnet50", "meta"), make_classifier("resnet50", "meta", stride_in_1x1=True)
    for layer in ("layer2", "layer3", "layer4"):
        first, second = getattr(plain.backbone, layer)[0], getattr(original.backbone, layer)[0]
        assert (first.conv1.stride, first.conv2.stride) == ((1, 1), (2, 2))
        assert (second.conv1.stride, second.conv2.stride) == ((2, 2), (1, 1))
    assert original(torch.zeros(1, 3, 64, 64, device="meta")).shape == (1, 5)


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "seresnextaa101d_32x8d"])
def test_stride_in_1x1_is_refused_for_networks_without_such_blocks(name):
    with pytest.raises(ConfigError, match=f"model.stride_in_1x1: {name} has no strided 3x3 convolution in bottlenecks"):
        make_classifier(name, "meta", stride_in_1x1=True)


def test_drop_path_reaches_the_backbone_or_is_refused():
    rates = [
        m.drop_prob for m in make_classifier("test_efficientnet", drop_path=0.3).modules() if hasattr(m, "drop_prob")
    ]
    assert 0 < max(rates) <= 0.3
    with pytest.raises(ConfigError, match=r"model.drop_path: densenet121 has no stochastic depth; got 0.1. Give 0"):
        make_classifier("densenet121", "meta", drop_path=0.1)


def test_a_network_without_pooled_features_is_refused():
    model = make_classifier()
    model.backbone = nn.Conv2d(3, 4, 3)
    with pytest.raises(ConfigError, match=r"features of shape \(1, 4, 6, 6\) rather than one vector"):
        model(torch.zeros(1, 3, 8, 8))


def test_an_alias_means_the_competitions_weights_only_from_the_hub():
    assert resolve_name("resnet50", "pretrained") == "resnet50.fb_swsl_ig1b_ft_in1k"
    assert resolve_name("resnet50", "random") == "resnet50"
    assert resolve_name("resnext101-wide", "weights.safetensors") == "resnext101_32x8d"
    assert resolve_name("resnet50.a1_in1k", "pretrained") == "resnet50.a1_in1k"
    assert all(resolve_name(alias, "pretrained") == full for alias, full in ALIASES.items())


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("resnet5O", "resnet50"),
        ("seresnexta101d_32x8d.sw_in12k_ft_in1k_288", "seresnextaa101d_32x8d.sw_in12k_ft_in1k_288"),
        ("resnet50.fb_sws_l_ig1b_ft_in1k", "resnet50.fb_swsl_ig1b_ft_in1k"),
        ("resnext50_32x4d.fb_sswl_ig1b_ft_in1k", "resnext50_32x4d.fb_swsl_ig1b_ft_in1k"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_one_that_was_meant(wrong, meant):
    with pytest.raises(ConfigError, match=f"model.name: timm has no .*did you mean .*'{meant}'"):
        resolve_name(wrong, "random")


def test_a_name_like_no_other_gets_the_aliases():
    with pytest.raises(ConfigError, match=r"timm has no model 'qqqqq'\. Give a timm name or one of .*resnext101-wide"):
        make_classifier("qqqqq")


def test_a_model_on_an_unreachable_hub_is_a_weights_error(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    with pytest.raises(WeightsError, match="somebody/something cannot be fetched from the hub: no route to host"):
        make_classifier("hf-hub:somebody/something")


def test_a_parameter_budget_counts_one_model_or_an_ensemble():
    check_parameter_budget([("a", 60_000_000), ("b", 40_000_000)], max_millions=100)
    with pytest.raises(ConfigError, match=r"budget is 20 M; got resnet50 25\.71 M parameters\. Choose a smaller"):
        check_parameter_budget([("resnet50", 25_708_708)], max_millions=20)
    with pytest.raises(ConfigError, match=r"100 M; got 2 models, 100\.01 M in all \(a 60\.00 M, b 40\.01 M\)"):
        check_parameter_budget([("a", 60_000_000), ("b", 40_010_000)], max_millions=100)


def test_the_budget_counts_frozen_parameters_too():
    model = make_classifier(device="meta")
    before = count_parameters(model)
    freeze_stages(model, "all")
    assert count_parameters(model) == before
    assert isinstance(model, Classifier)


def test_a_vision_transformer_takes_any_multiple_of_its_patch_and_is_unchanged_at_its_own_size():
    model = make_classifier("test_vit").eval()
    plain = timm.create_model("test_vit", num_classes=0).eval()
    plain.load_state_dict(model.backbone.state_dict())
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(model.features(images), plain(images))
    assert model.features(torch.randn(2, 3, 96, 96)).shape == (2, model.head.in_features)


def test_a_size_that_an_architecture_does_not_take_is_one_sentence():
    with pytest.raises(ConfigError, match=r"mixer_s32_224 takes images of 224 pixels; got 96 .*eval.size"):
        make_classifier("mixer_s32_224").features(torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize(
    ("name", "size", "takes"),
    [
        ("mixer_s32_224", 96, r"images of 224 pixels; got 96 "),
        ("levit_128s", 192, r"images of 224 pixels; got 192 "),  # refused by a shape deep within
        ("test_vit", 100, r"images of 160 pixels, or of other multiples of its patch; got 100 "),
    ],
)
def test_a_size_is_refused_before_anything_is_computed(name, size, takes):
    with pytest.raises(ConfigError, match=rf"model.name: {name} takes {takes}.*augment.size"):
        require_size(name, size)


@pytest.mark.parametrize("size", [96, 192, 200])
def test_a_swin_transformer_takes_other_sizes_and_is_unchanged_at_its_own(size):
    name = "swin_tiny_patch4_window7_224"
    require_size(name, size)
    model = make_classifier(name).eval()
    plain = timm.create_model(name, num_classes=0).eval()
    plain.load_state_dict(model.backbone.state_dict())
    with torch.inference_mode():
        assert model.features(torch.randn(1, 3, size, size)).shape == (1, model.head.in_features)
        images = torch.randn(1, 3, 224, 224)
        assert torch.equal(model.features(images), plain(images))


def _saved_bytes(model, images):
    """Bytes that autograd keeps of one forward pass, apart from weights; each memory once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images)
    return sum(kept.values()), logits


def test_a_frozen_prefix_keeps_no_activations():
    model = make_classifier("resnet50")
    images = torch.randn(1, 3, 224, 224)
    freeze_stages(model, 0, freeze_batchnorm=True)
    model.train()
    plain, _ = _saved_bytes(model, images)
    freeze_stages(model, 2, freeze_batchnorm=True)
    frozen, _ = _saved_bytes(model, images)
    assert frozen <= 0.6 * plain
    freeze_stages(model, "all", freeze_batchnorm=True)
    nothing, _ = _saved_bytes(model, images)
    assert nothing <= 0.01 * plain  # the head's own input


def test_a_frozen_prefix_changes_no_gradient_of_what_learns():
    model = make_classifier()
    freeze_stages(model, 3, freeze_batchnorm=True)
    model.train()
    images = torch.randn(4, 3, 64, 64)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = torch.autograd.grad(model(images).square().sum(), learning)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    whole = torch.autograd.grad(model(images).square().sum(), learning)
    assert len(learning) > 3
    assert all(torch.equal(one, other) for one, other in zip(frozen, whole, strict=True))


def test_timms_private_grouping_still_groups_as_the_stages_need():
    from timm.models._manipulate import group_with_matcher

    matcher = {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)"}
    names = ["conv1.weight", "bn1.bias", "layer1.0.weight", "layer2.0.weight", "fc.weight"]
    groups = group_with_matcher(iter([(name, name) for name in names]), matcher)
    assert list(groups.values()) == [
        ["conv1.weight", "bn1.bias"],
        ["layer1.0.weight"],
        ["layer2.0.weight"],
        ["fc.weight"],
    ]


def test_backbones_worth_a_look_are_listed_with_what_they_cost_and_are_timms():
    """Each has weights in timm and the parameters that are said of it; a pattern finds the same numbers."""
    rows = list_models("")
    names = [row["name"] for row in rows]
    assert {"tf_efficientnet_lite1.in1k", "convnext_tiny.in12k_ft_in1k", *ALIASES.values()} <= set(names)
    assert all(timm.is_model_pretrained(name) for name in names)
    assert all(row["parameters_millions"] and row["gmacs"] for row in rows)
    lite = list_models("tf_efficientnet_lite0.in1k")[0]
    assert lite == rows[names.index(lite["name"])]
    model = timm.create_model("tf_efficientnet_lite0")
    assert lite["parameters_millions"] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.05)
    unknown = list_models("efficientnet_lite0.ra_in1k")
    assert unknown[0]["top1"] is None
    assert " –  " in format_models(unknown)
    assert "photos/s" not in format_models(rows)
    assert "  512.0 " in format_models([{**lite, "photos_per_second": 512.0}])
