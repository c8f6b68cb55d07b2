"""The network: the article's LeNet-5 and the 1998 original, in plain torch.

In training it may have more weights: :func:`fold` then makes a plain LeNet-5 of it that computes the same.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.nn.utils.parametrize import register_parametrization

from lenet_pl.convolution import Conv2d, convolve
from lenet_pl.errors import require


class ComposedKernel(nn.Module):
    """Makes a 5×5 kernel of two 3×3 kernels, one after the other.

    The net computes with the 5×5 kernel, and Adam trains the two others. Together they have more weights, which lets
    the net reach a higher accuracy (Guo, Alvarez & Salzmann, "ExpandNets", 2020). It is a parametrization of torch:
    ``forward`` runs whenever a layer's ``weight`` is read, and ``right_inverse`` once, for the first weights.
    """

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Returns the kernel ``[O, I, 5, 5]`` of ``[M, I, 3, 3]`` followed by ``[O, M, 3, 3]``."""
        # torch's convolution does not flip its kernel, so that a composition has to.
        return convolve(first.transpose(0, 1), second.flip(2, 3), padding=2).transpose(0, 1)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Draws two orthogonal kernels for a layer whose weights have the shape of ``weight``."""
        outputs, inputs = weight.shape[:2]
        between = 4 * max(outputs, inputs)  # channels
        first, second = weight.new_empty(between, inputs, 3, 3), weight.new_empty(outputs, between, 3, 3)
        return nn.init.orthogonal_(first, 2**0.5), nn.init.orthogonal_(second)


class AvgPool2d(nn.AvgPool2d):
    """Averages windows of 2×2.

    In training on a CPU it shrinks the image instead, which gives the same up to rounding: torch's ``avg_pool2d`` takes
    twice as long there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, C, H / 2, W / 2]`` for ``[N, C, H, W]`` with even H and W."""
        if self.training and x.is_cpu and not torch.compiler.is_compiling():
            return F.interpolate(x, scale_factor=0.5, mode="bilinear")
        return super().forward(x)


class Flatten(nn.Module):
    """Flattens rows, columns and channels in that order, as Keras does.

    In channels_last memory this copies nothing. Above all, the gradient comes back in channels_last; otherwise pooling
    and ReLU would spend a fifth of a training step on reordering it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, H * W * C]`` for ``[N, C, H, W]``."""
        return x.permute(0, 2, 3, 1).flatten(1)


class LeNet5(nn.Module):
    """LeNet-5: two convolutions, two average pools, three linear layers.

    The ``article`` variant pads the second convolution and uses ReLU (107,786 parameters); ``classic`` keeps the
    unpadded second convolution and the tanh of LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied
    to Document Recognition" (1998), section II.B (61,706 parameters). Four simplifications of that paper are
    customary and kept: the second convolution sees all six maps, pooling has no weights, tanh is not scaled, and the
    output is a plain linear layer.

    Args:
        variant: ``"article"`` or ``"classic"``.
        dropout: Probability of zeroing an activation after each of the two hidden linear layers, 0 ≤ p < 1.
        init: First weights: ``"uniform"``, which is PyTorch's default, or ``"orthogonal"`` with gain √2 and zero biases
            (Saxe, McClelland & Ganguli 2014), where no two filters begin alike.
        batch_norm: Whether to normalise batches (Ioffe & Szegedy 2015) after each layer that has weights, except the
            last. With ``"linear"`` only after the two hidden linear layers, which costs a CPU next to nothing.
        composed_kernels: Whether each 5×5 kernel is composed of two, see :class:`ComposedKernel`. Their first weights
            are orthogonal, whatever ``init`` says.

    Raises:
        UsageError: If an argument is out of its range.
    """

    def __init__(
        self,
        variant: str = "article",
        dropout: float = 0.0,
        init: str = "uniform",
        batch_norm: bool | str = False,
        composed_kernels: bool = False,
    ) -> None:
        super().__init__()
        require(variant in ("article", "classic"), f"model.variant={variant!r}", "'article' or 'classic'")
        require(0 <= dropout < 1, f"model.dropout={dropout}", "a probability from 0 to below 1, such as 0.1")
        require(init in ("uniform", "orthogonal"), f"model.init={init!r}", "'uniform' or 'orthogonal'")
        require(batch_norm in (False, True, "linear"), f"model.batch_norm={batch_norm!r}", "true, false or 'linear'")
        self.variant, self.dropout = variant, dropout
        article = variant == "article"
        side = 7 if article else 5
        activation = partial(nn.ReLU, inplace=True) if article else nn.Tanh
        self.features = nn.Sequential(  # [N, 1, 28, 28]
            Conv2d(1, 6, 5, padding=2),  # [N, 6, 28, 28]
            activation(),
            AvgPool2d(2),  # [N, 6, 14, 14]
            Conv2d(6, 16, 5, padding=2 if article else 0),  # [N, 16, 14, 14]; classic [N, 16, 10, 10]
            activation(),
            AvgPool2d(2),  # [N, 16, 7, 7]; classic [N, 16, 5, 5]
            Flatten(),  # [N, 784]; classic [N, 400]
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * side * side, 120),  # [N, 120]
            activation(),
            nn.Dropout(dropout),
            nn.Linear(120, 84),  # [N, 84]
            activation(),
            nn.Dropout(dropout),
            nn.Linear(84, 10),  # [N, 10]
        )
        if init == "orthogonal":
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.orthogonal_(parameter, 2**0.5)
                else:
                    nn.init.zeros_(parameter)
        if batch_norm and batch_norm != "linear":
            self.features = _with_batch_norm(self.features)
        if batch_norm:
            self.classifier = _with_batch_norm(self.classifier)
        if composed_kernels:
            for layer in self.features:
                if isinstance(layer, nn.Conv2d):
                    register_parametrization(layer, "weight", ComposedKernel())

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits, ``[N, 10]``, of normalised float images, ``[N, 1, 28, 28]``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _with_batch_norm(layers: nn.Sequential) -> nn.Sequential:
    result: list[nn.Module] = []
    for layer in layers:
        result.append(layer)
        if isinstance(layer, nn.Conv2d):
            result.append(nn.BatchNorm2d(layer.out_channels))
        elif isinstance(layer, nn.Linear) and layer is not layers[-1]:
            result.append(nn.BatchNorm1d(layer.out_features))
    return nn.Sequential(*result)


def fold(net: LeNet5) -> LeNet5:
    """Returns a plain LeNet-5 in evaluation mode that computes what ``net`` computes in evaluation mode.

    A composed kernel becomes the 5×5 kernel. Batch normalisation, which after the training is a scale and an offset for
    each channel, becomes part of the weights and the bias before it. ``net`` has the layers that its class gave it.
    """
    with torch.device("meta"):  # makes the layers without memory, and draws no random numbers
        plain = LeNet5(net.variant, net.dropout).eval()
    pairs: list[Any] = []  # the weight and the bias of each layer
    for layer in (*net.features, *net.classifier):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            pairs.append((layer.weight, layer.bias))
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm):
            weight, bias = pairs.pop()
            fuse: Any = fuse_linear_bn_weights if weight.ndim == 2 else fuse_conv_bn_weights
            statistics = (layer.running_mean, layer.running_var, layer.eps)
            pairs.append(fuse(weight, bias, *statistics, layer.weight, layer.bias))
    tensors = [tensor.detach() for pair in pairs for tensor in pair]
    plain.load_state_dict(dict(zip(plain.state_dict(), tensors, strict=True)), assign=True)
    return plain


def layers(variant: str) -> list[tuple[str, str, int]]:
    """Returns kind, output shape such as ``[N, 6, 28, 28]``, and number of parameters of the plain net's layers."""
    rows: list[tuple[str, str, int]] = []
    with torch.device("meta"):  # only the shapes are computed
        net, x = LeNet5(variant), torch.empty(1, 1, 28, 28)
    for layer in (*net.features, *net.classifier):
        x = layer(x)
        shape = ", ".join(["N", *map(str, x.shape[1:])])
        rows.append((type(layer).__name__, f"[{shape}]", sum(p.numel() for p in layer.parameters())))
    return rows
