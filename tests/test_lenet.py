"""The network: its size, its shapes, and what it refuses."""

import pytest
import torch

from lenet_pl import LeNet5, LitLeNet


@pytest.mark.parametrize(("variant", "parameters"), [("article", 107_786), ("classic", 61_706)])
def test_parameters_and_shapes(variant, parameters):
    net = LeNet5(variant)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_outputs_are_logits():
    logits = LeNet5()(torch.randn(64, 1, 28, 28))
    assert logits.min() < 0
    assert not torch.allclose(logits.sum(-1), torch.ones(64))


@pytest.mark.parametrize("arguments", [{"variant": "resnet"}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_refuses_by_name_and_value(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected"):
        LeNet5(**arguments)


def test_averaged_weights_are_evaluated_and_trained_ones_trained():
    model = LitLeNet(ema_decay=0.5)
    images = torch.randn(4, 1, 28, 28)
    model.average.update_parameters(model.net)  # the first update copies
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(1)
    assert torch.equal(model.train()(images), model.net(images))
    assert torch.equal(model.eval()(images), model.average.module(images))
    assert not torch.allclose(model.train()(images), model.eval()(images))


def test_flip_averages_the_logits_of_both_mirrorings():
    model, images = LitLeNet(tta="flip").eval(), torch.randn(4, 1, 28, 28)
    expected = (model.net(images) + model.net(images.flip(-1))) / 2
    assert torch.equal(model(images), expected)
    assert torch.equal(model.train()(images), model.net(images))
