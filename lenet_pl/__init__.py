"""LeNet-5 on Fashion-MNIST with PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lenet_pl.datamodule import FashionMNISTDataModule
    from lenet_pl.lenet import LeNet5
    from lenet_pl.module import LitLeNet

__version__ = "0.1.0"
__all__ = ["FashionMNISTDataModule", "LeNet5", "LitLeNet", "__version__"]

_HOME = {"FashionMNISTDataModule": "datamodule", "LeNet5": "lenet", "LitLeNet": "module"}


def __getattr__(name: str) -> Any:
    """Imports an exported name when it is first used, because ``--help`` must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lenet_pl.{_HOME[name]}"), name)
