"""The net with its normalisation, and its answers for the test images, on which the report and the export rest."""

import torch
from torch import Tensor, nn

from lenet_pl.datamodule import FashionMNISTDataModule
from lenet_pl.loader import EVAL_BATCH_SIZE, normalise
from lenet_pl.module import LitLeNet


class Classifier(nn.Module):
    """Classifies raw pixels; ``mean`` and ``std`` are those that ``net`` was trained with."""

    def __init__(self, net: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits, ``[N, 10]``, of uint8 images, ``[N, 1, 28, 28]``, on the net's device."""
        logits: Tensor = self.net(normalise(images, self.mean, self.std))
        return logits


@torch.inference_mode()
def classify_test_images(model: LitLeNet, data: FashionMNISTDataModule) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the test images, uint8 ``[N, 1, 28, 28]``, their labels, ``[N]``, and the model's logits, ``[N, 10]``.

    All three are on the CPU. The model stays on its device, and is left in evaluation mode and in float32.

    Raises:
        DataError: If the images are missing and cannot be fetched.
    """
    data.prepare_data()
    data.setup("test")
    images, labels = data.test_set
    classifier = Classifier(model.eval().float(), data.mean, data.std)
    logits = [classifier(batch.to(model.device)).cpu() for batch in images.split(EVAL_BATCH_SIZE)]
    return images, labels, torch.cat(logits)
