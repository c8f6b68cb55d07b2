"""The network: its size, its shapes, and the arguments that it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lenet_pl import FashionMNISTDataModule, LeNet5
from lenet_pl.convolution import as_product
from lenet_pl.lenet import ComposedKernel, fold
from lenet_pl.loader import normalise


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


def trained(images: torch.Tensor, **arguments: object) -> LeNet5:
    """Takes some steps, so that no batch statistics and no weight are those of the start."""
    torch.manual_seed(0)
    net = LeNet5(init="orthogonal", **arguments)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for batch in images.split(100)[:20]:
        optimizer.zero_grad()
        F.cross_entropy(net(batch), torch.arange(len(batch)) % 10).backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize(
    ("variant", "parameters"), [("article", 107_786), pytest.param("classic", 61_706, marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
    ("batch_norm", "composed"),
    [
        pytest.param(True, False, marks=pytest.mark.long),
        pytest.param(False, True, marks=pytest.mark.long),
        (True, True),
    ],
)
def test_a_richer_net_folds_into_the_plain_one(variant, parameters, batch_norm, composed):
    images = torch.randn(1000, 1, 28, 28)
    net = trained(images, variant=variant, batch_norm=batch_norm, composed_kernels=composed).double()
    plain = LeNet5(variant).double().eval()
    plain.load_state_dict(fold(net).state_dict())
    images = images.double()
    assert sum(p.numel() for p in net.parameters()) > sum(p.numel() for p in plain.parameters()) == parameters
    torch.testing.assert_close(plain(images), net(images))


@pytest.mark.data
def test_folding_keeps_the_logits_of_all_test_images(real_data):
    data = FashionMNISTDataModule()
    for stage in ("fit", "test"):
        data.setup(stage)
    train = normalise(data.train_set[0][:2000], data.mean, data.std)
    net = trained(train, batch_norm=True, composed_kernels=True)
    plain = fold(net)
    with torch.inference_mode():
        for images in normalise(data.test_set[0], data.mean, data.std).split(1000):
            torch.testing.assert_close(plain(images), net(images), atol=1e-5, rtol=0)


def test_folding_draws_no_random_numbers():
    torch.manual_seed(0)
    net = LeNet5(batch_norm=True, composed_kernels=True)
    state = torch.get_rng_state()
    fold(net)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_composed_kernel_is_that_of_two_convolutions():
    images, first, second = torch.randn(2, 3, 12, 12), torch.randn(8, 3, 3, 3), torch.randn(4, 8, 3, 3)
    kernel = ComposedKernel()(first, second)
    torch.testing.assert_close(
        F.conv2d(images, kernel), F.conv2d(F.conv2d(images, first), second), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("images", "kernels", "padding"),
    [
        ((4, 1, 28, 28), (6, 1, 5, 5), 2),
        ((4, 6, 14, 14), (16, 6, 5, 5), 0),
        ((6, 64, 3, 3), (16, 64, 3, 3), 2),  # as ComposedKernel does
    ],
)
def test_a_product_of_matrices_is_the_convolution(images, kernels, padding):
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in (images, kernels))
    ours, reference = as_product(x, weight, padding), F.conv2d(x, weight, padding=padding)
    torch.testing.assert_close(ours, reference)
    gradient = torch.randn_like(reference)
    gradients = [torch.autograd.grad(result, (x, weight), gradient) for result in (ours, reference)]
    torch.testing.assert_close(*gradients)
