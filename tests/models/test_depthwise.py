import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from fieldmark.models import depthwise
from fieldmark.models.depthwise import WIDEST_GOOD_KERNEL, DepthwiseGradients


def _gradients(photos, weight, bias, gradient, *, stride, padding, ours):
    """Output, and gradients of input, weights and bias."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (photos, weight, bias)]
    if ours:
        with DepthwiseGradients():
            out = functional.conv2d(*leaves, stride, padding, 1, len(weight))
        assert type(out.grad_fn).__name__ == "_ConvolutionBackward"
    else:
        out = functional.conv2d(*leaves, stride, padding, 1, len(weight))
    out.backward(gradient.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("side", "stride", "padding", "height", "width"),
    [(3, 2, 1, 9, 12), (3, 2, 0, 8, 7), (5, 1, 2, 6, 11), (5, 2, 2, 10, 9), (7, 1, 3, 4, 3), (4, 3, 1, 13, 14)],
)
def test_gradients_are_those_of_torch(side, stride, padding, height, width, threads):
    generator = torch.Generator().manual_seed(side)
    photos = torch.randn(4, 20, height, width, generator=generator).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(20, 1, side, side, generator=generator), torch.randn(20, generator=generator)
    shape = functional.conv2d(photos, weight, None, stride, padding, groups=20).shape
    gradient = torch.randn(shape, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = _gradients(photos, weight, bias, gradient, stride=stride, padding=padding, ours=True)
    finally:
        torch.set_num_threads(before)
    exact = _gradients(
        photos.double(), weight.double(), bias.double(), gradient, stride=stride, padding=padding, ours=False
    )
    for mine, true in zip(ours, exact, strict=True):
        assert mine.shape == true.shape
        torch.testing.assert_close(mine.double(), true, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("side", "stride"), [(3, 2), (5, 1), (5, 2)])
def test_in_bf16_sums_are_as_exact_as_its_numbers(side, stride):
    generator = torch.Generator().manual_seed(1)
    photos = torch.randn(3, 32, 12, 12, generator=generator).to(memory_format=torch.channels_last).bfloat16()
    weight = torch.randn(32, 1, side, side, generator=generator).bfloat16()
    bias = torch.zeros(32).bfloat16()
    shape = functional.conv2d(photos, weight, None, stride, side // 2, groups=32).shape
    gradient = torch.randn(shape, generator=generator).bfloat16()
    ours = _gradients(photos, weight, bias, gradient, stride=stride, padding=side // 2, ours=True)
    exact = _gradients(
        photos.double(), weight.double(), bias.double(), gradient, stride=stride, padding=side // 2, ours=False
    )
    # The other gradient is torch's, which processors without bf16 sum in bf16 itself.
    for mine, true, is_ours in ((ours[1], exact[1], stride > 1), (ours[2], exact[2], side > WIDEST_GOOD_KERNEL)):
        assert mine.dtype == torch.bfloat16
        if is_ours or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            torch.testing.assert_close(mine.double(), true, atol=1e-2, rtol=2**-8)  # half a unit of bf16's last place


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto"])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_a_whole_network_learns_as_with_torch(name, is_bf16):
    """Same padding, no padding, squeeze-and-excitation, kernels of 7: the gradient of every parameter."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).to(memory_format=torch.channels_last).eval()
    photos = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)

    def gradients(*, is_bf16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            model(photos).float().square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    exact, plain = gradients(is_bf16=False), gradients(is_bf16=is_bf16)
    with DepthwiseGradients():
        ours = gradients(is_bf16=is_bf16)
    errors = [
        sum(
            float((found[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)) for name, gradient in exact.items()
        )
        for found in (ours, plain)
    ]
    # In bf16 torch errs too, by as much as the processor makes it.
    assert errors[0] <= 1.05 * errors[1] + 1e-4 * len(exact)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # good already
        nn.Conv2d(8, 16, 5, padding=2, groups=8),
        nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8),
        nn.Conv2d(8, 8, (5, 3), padding=(2, 1), groups=8),
        nn.Conv2d(8, 8, 5, padding="same", groups=8),
        nn.Conv2d(8, 8, 5, padding=2, groups=4),
        nn.Conv2d(8, 8, 5, padding=2),
    ],
    ids=lambda layer: str(layer),
)
def test_other_convolutions_stay_torchs_own(layer):
    photos = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    with DepthwiseGradients():
        out = layer(photos)
    assert out.grad_fn.name().startswith("ConvolutionBackward")


def test_contiguous_photos_and_half_floats_stay_torchs_own():
    layer = nn.Conv2d(8, 8, 5, padding=2, groups=8)
    with DepthwiseGradients():
        assert layer(torch.randn(2, 8, 9, 9)).grad_fn.name().startswith("ConvolutionBackward")
        half = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last).half()
        assert layer.half()(half).grad_fn.name().startswith("ConvolutionBackward")


def test_nothing_is_computed_for_what_is_frozen(monkeypatch):
    def never(*_, **__):
        raise AssertionError("computed in vain")

    photos = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    layer = nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8).requires_grad_(False)
    with DepthwiseGradients():
        assert layer(photos).grad_fn is None
        monkeypatch.setattr(depthwise, "weight_gradient", never)
        wanted = photos.clone(memory_format=torch.channels_last).requires_grad_()
        layer(wanted).sum().backward()
        assert wanted.grad is not None
        monkeypatch.undo()
        monkeypatch.setattr(depthwise, "input_gradient", never)
        layer.requires_grad_(True)(photos).sum().backward()
        assert layer.weight.grad is not None


def test_only_training_on_the_processor_uses_them(monkeypatch):
    from fieldmark.models.classifier import create_classifier

    model = create_classifier(
        "mobilenetv3_small_050", num_classes=2, head="linear", head_hidden=1, head_dropout=0, feature_dropout=0,
        drop_path=0, stride_in_1x1=False,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    photos = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    calls = []
    true = depthwise.weight_gradient
    monkeypatch.setattr(depthwise, "weight_gradient", lambda *args, **more: calls.append(1) or true(*args, **more))
    model.eval()(photos).sum().backward()
    assert not calls
    model.train()(photos).sum().backward()
    assert calls
