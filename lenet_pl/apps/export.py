"""Writes a trained net as an ONNX file, but only if that file classifies the test images like the checkpoint."""

import hashlib
import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lenet_pl import __version__, runs
from lenet_pl.apps.classifier import Classifier, classify_test_images
from lenet_pl.atomic import write_atomic
from lenet_pl.datamodule import FashionMNIST, FashionMNISTDataModule
from lenet_pl.errors import Failure, UsageError
from lenet_pl.lenet import LeNet5
from lenet_pl.loader import EVAL_BATCH_SIZE
from lenet_pl.module import LitLeNet
from lenet_pl.names import one_line

TOLERANCE = 1e-4  # of a logit; summing float32 in another order changes them by about 1e-5


def write(ckpt_path: Path, model: LitLeNet, data: FashionMNISTDataModule, output: str | None = None) -> None:
    """Exports a checkpoint's module, and prints the file, the proof, the test accuracy and code that uses the file.

    The file takes ``images``, uint8 ``[N, 1, 28, 28]`` with any N, and gives ``logits``, float32 ``[N, 10]``. Its
    metadata are text: ``classes`` (a JSON list), ``variant``, ``checkpoint_sha256``, ``lenet_pl`` (the version) and
    ``test_accuracy`` (0 to 1). ``output`` names the file, which then ends in .onnx, or its folder; by default that is
    the checkpoint's. ``data`` has the checkpoint's settings. The module is left in evaluation mode and in float32.

    Raises:
        UsageError: If an optional package is missing, or ``output`` is a file of another kind.
        DataError: If the test images are missing and cannot be fetched.
        Failure: If the file does not classify the test images like the checkpoint. Nothing is written then.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(package) is None:
            remedy = "install it with: pip install 'lenet_pl[export]'"
            raise UsageError(f"export needs {package}, which is not installed; {remedy}")
    path = runs.beside(ckpt_path) if output is None else Path(output)
    if path.exists() and not path.is_dir() and path.suffix.lower() != ".onnx":
        raise UsageError(f"output={one_line(path)}: expected a folder, or a file that ends in .onnx")
    if path.is_dir() or path.suffix.lower() != ".onnx":
        path = path / "lenet.onnx"
    images, labels, expected = classify_test_images(model, data)
    accuracy = (expected.argmax(1) == labels).double().mean().item()
    net = LeNet5(model.hparams["variant"])  # contiguous float32 on the CPU, whatever the training used
    net.load_state_dict(model.net.state_dict())
    metadata = {
        "classes": json.dumps(FashionMNIST.classes),
        "variant": model.hparams["variant"],
        "checkpoint_sha256": hashlib.sha256(ckpt_path.read_bytes()).hexdigest(),
        "lenet_pl": __version__,
        "test_accuracy": f"{accuracy:.4f}",
    }
    content = _onnx(Classifier(net.eval(), data.mean, data.std), metadata)
    difference = _prove(content, images, expected)
    write_atomic(path, content)
    print(f"{one_line(path)}: {len(content) / 1000:,.0f} kB")
    print(f"{len(images):,} test images: same class for all, largest difference {difference:.1e}")
    print(f"Test accuracy: {accuracy:.2%}")
    use = f"onnxruntime.InferenceSession({str(path)!r}).run(None, {{'images': pixels}})"
    print(f"use: {use}  # uint8 [N, 1, 28, 28]")


def _onnx(classifier: Classifier, metadata: dict[str, str]) -> bytes:
    """Returns the content of the ONNX file."""
    import onnx

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about their own steps
        exported = torch.onnx.export(
            classifier,
            (torch.zeros(2, 1, 28, 28, dtype=torch.uint8),),  # two images, because one would become a constant
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("N")}},
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces, which name folders of this machine
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    content: bytes = proto.SerializeToString()
    return content


def _prove(content: bytes, images: Tensor, expected: Tensor) -> float:
    """Returns the largest difference between the file's logits and those ``expected``, ``[N, 10]``.

    Raises:
        Failure: If an image gets another class, or if the difference is above ``TOLERANCE`` or no number.
    """
    logits = _run(content, images)
    same = int((logits.argmax(1) == expected.argmax(1)).sum())
    difference = (logits - expected).abs().max().item()
    if same < len(images) or not difference <= TOLERANCE:  # NaN is not
        raise Failure(
            f"the ONNX file classifies {same:,} of {len(images):,} images like the checkpoint and differs by up to "
            f"{difference:.1e}; expected all of them and at most {TOLERANCE:.0e}. Nothing was written"
        )
    return difference


def _run(content: bytes, images: Tensor) -> Tensor:
    """Returns the logits as ONNX Runtime computes them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    batches = [images[:1], images[1:8], *images[8:].split(EVAL_BATCH_SIZE)]  # with N = 1 and an odd N
    logits = [session.run(["logits"], {"images": batch.numpy()})[0] for batch in batches]
    return torch.from_numpy(np.concatenate(logits))
