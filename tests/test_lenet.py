"""The network: its size, its shapes, and the arguments that it refuses."""

import copy

import pytest
import torch
from torch import nn

from lenet_pl import LeNet5


@pytest.mark.parametrize(("variant", "parameters"), [("article", 107_786), ("classic", 61_706)])
def test_parameters_and_shapes(variant, parameters):
    net = LeNet5(variant)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_outputs_are_logits():
    logits = LeNet5()(torch.randn(64, 1, 28, 28))
    assert logits.min() < 0
    assert not torch.allclose(logits.sum(-1), torch.ones(64))


@pytest.mark.parametrize("arguments", [{"variant": "resnet"}, {"dropout": 1.0}, {"dropout": -0.1}, {"init": "he"}])
def test_refuses_by_name_and_value(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected"):
        LeNet5(**arguments)


def stock(net: LeNet5) -> nn.Sequential:
    """The same net in torch's own layers. Its first linear layer takes channels, rows and columns in that order."""
    features = [nn.AvgPool2d(2) if isinstance(m, nn.AvgPool2d) else copy.deepcopy(m) for m in net.features]
    classifier = copy.deepcopy(net.classifier)
    first = classifier[0]
    first.weight.data = first.weight.data.unflatten(1, (7, 7, 16)).permute(0, 3, 1, 2).flatten(1)
    return nn.Sequential(*features[:-1], nn.Flatten(), *classifier)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_stock_layers(memory_format, training):
    net = LeNet5().train(training).to(memory_format=memory_format)
    reference, images = stock(net), torch.randn(8, 1, 28, 28)
    outputs = [net(images), reference(images)]
    torch.testing.assert_close(*outputs)
    gradients = [
        torch.autograd.grad(o.square().sum(), n.features[0].weight if n is net else n[0].weight)[0]
        for o, n in zip(outputs, (net, reference), strict=True)
    ]
    torch.testing.assert_close(*gradients)


def test_orthogonal_weights():
    net = LeNet5(init="orthogonal")
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            rows = parameter.flatten(1)  # never more rows than columns
            torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), atol=1e-5, rtol=0)
