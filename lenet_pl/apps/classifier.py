"""The net with its normalisation: raw pixels in, logits out. Export, report and demo all use this one module."""

import torch
from torch import Tensor, nn

from lenet_pl.loader import EVAL_BATCH_SIZE, normalise


class Classifier(nn.Module):
    """Classifies uint8 images as a file holds them; ``mean`` and ``std`` are those that ``net`` was trained with."""

    def __init__(self, net: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits, ``[N, 10]``, of images ``[N, 1, 28, 28]``, uint8, on the net's device."""
        logits: Tensor = self.net(normalise(images, self.mean, self.std))
        return logits

    @torch.inference_mode()
    def in_batches(self, images: Tensor) -> Tensor:
        """Classifies any number of images on the net's device; takes them from the CPU and returns the logits there."""
        device = next(self.net.parameters()).device
        return torch.cat([self(batch.to(device)).cpu() for batch in images.split(EVAL_BATCH_SIZE)])
