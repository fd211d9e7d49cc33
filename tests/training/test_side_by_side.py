"""Micro-batches that are computed side by side."""

from concurrent.futures import ThreadPoolExecutor

import torch
from lightning_fabric import Fabric

from fieldmark.data.loader import limit_team
from fieldmark.training.loop import UpdateOptions, compute_gradients, soft_cross_entropy


def test_micro_batches_side_by_side_have_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(5))
    images, targets = torch.randn(12, 3, 8, 8), torch.rand(12, 5).softmax(1)
    expected = soft_cross_entropy(network(images), targets, None)
    (expected / 12).backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad(set_to_none=True)
    fabric = Fabric(accelerator="cpu", devices=1)
    with ThreadPoolExecutor(2, initializer=limit_team) as pool:
        options = UpdateOptions(pool=pool)
        total, logits = compute_gradients(fabric, network, images, targets, 4, options, scale=1 / 12)
        first = [parameter.grad.clone() for parameter in network.parameters()]
        compute_gradients(fabric, network, images, targets, 4, options, scale=1 / 12)
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(logits, network(images).detach())
    for parameter, wanted, once in zip(network.parameters(), gradients, first, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
        assert torch.equal(parameter.grad, once)  # whichever thread is faster
