"""Writes a trained net as an ONNX file, but only if that file classifies the test images like the checkpoint."""

import hashlib
import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from lenet_pl import __version__
from lenet_pl.apps.classifier import Classifier
from lenet_pl.atomic import write_atomic
from lenet_pl.datamodule import FashionMNIST, FashionMNISTDataModule
from lenet_pl.download import DataError
from lenet_pl.errors import UsageError
from lenet_pl.lenet import LeNet5
from lenet_pl.loader import EVAL_BATCH_SIZE, generator
from lenet_pl.module import LitLeNet
from lenet_pl.names import one_line

TOLERANCE = 1e-4  # of a logit or a probability; summing float32 in another order changes them by about 1e-5
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OUTPUTS = ["logits", "probabilities"]


class _WithProbabilities(nn.Module):
    """Adds the probabilities to the logits of a classifier, because the file gives both."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier(images)
        return logits, logits.softmax(-1)


@torch.no_grad()
def write(ckpt_path: Path, model: LitLeNet, data: FashionMNISTDataModule, output: str | None = None) -> Path:
    """Exports the net, and prints the file, the proof, the test accuracy and a line of code that uses the file.

    The file takes ``images``, uint8 ``[N, 1, 28, 28]`` with any N, and gives ``logits`` and ``probabilities``, float32
    ``[N, 10]``. Its metadata are all text: ``classes`` (a JSON list), ``mean``, ``std``, ``variant``,
    ``checkpoint_sha256``, ``lenet_pl`` (the version) and ``test_accuracy`` (0 to 1). Where the test images are
    missing, random images serve for the proof, and there is no ``test_accuracy``.

    Args:
        ckpt_path: The checkpoint's file.
        model: The checkpoint's module; it is left in evaluation mode and in float32.
        data: A datamodule with the checkpoint's settings; it reads the test images if it has not done so.
        output: A folder, or a file whose name ends in .onnx; by default the checkpoint's folder.

    Returns:
        The file that was written.

    Raises:
        UsageError: If an optional package is missing, or ``output`` is a file of another kind.
        RuntimeError: If the file gives an image another class than the checkpoint, or a logit or probability that
            differs by more than ``TOLERANCE``. Nothing is written then.
        OSError: If the file cannot be written; an earlier one is then intact.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        remedy = "which is not installed; install it with: pip install 'lenet_pl[export]'"
        raise UsageError(f"export needs {missing[0]}, {remedy}")
    path = _path(Path(output) if output else ckpt_path.parent)
    images, labels = _images(data)
    expected = Classifier(model.eval().float(), data.mean, data.std).in_batches(images)  # [N, 10]
    classes = expected.argmax(-1)
    variant = model.hparams["variant"]
    metadata = {"classes": json.dumps(FashionMNIST.classes), "mean": str(data.mean), "std": str(data.std)}
    metadata |= {"variant": variant, "lenet_pl": __version__}
    metadata["checkpoint_sha256"] = hashlib.sha256(ckpt_path.read_bytes()).hexdigest()
    if labels is not None:
        metadata["test_accuracy"] = f"{(classes == labels).double().mean():.4f}"
    net = LeNet5(variant).eval()  # contiguous float32 on the CPU, whatever the training used
    net.load_state_dict(model.net.state_dict())
    content = _onnx(Classifier(net, data.mean, data.std), metadata)
    logits, probabilities = _run(content, images)
    same = int((logits.argmax(-1) == classes).sum())
    difference = float((logits - expected).abs().max())
    largest = max(difference, float((probabilities - expected.softmax(-1)).abs().max()))
    finite = bool(logits.isfinite().all() and probabilities.isfinite().all())
    if same < len(images) or not finite or largest > TOLERANCE:
        raise RuntimeError(
            f"the ONNX file classifies {same:,} of {len(images):,} images like the checkpoint and differs by up to "
            f"{largest:.1e}; expected all of them and at most {TOLERANCE:.0e}. Nothing was written"
        )
    write_atomic(path, content)
    kind = "random" if labels is None else "test"
    print(f"{one_line(path)}: {len(content) / 1000:,.0f} kB")
    print(f"{len(images):,} {kind} images: same class for {same:,}, largest difference of logits {difference:.1e}")
    if labels is None:
        print("The test images are missing, so no accuracy was measured; python -m lenet_pl test says why")
    else:
        print(f"Test accuracy: {float(metadata['test_accuracy']):.2%}")
    use = f"onnxruntime.InferenceSession({str(path)!r}).run(None, {{'images': pixels}})"
    print(f"use: {use}  # uint8 [N, 1, 28, 28]")
    return path


def _path(output: Path) -> Path:
    """Returns the file that ``output`` means: itself, or lenet.onnx in that folder."""
    if output.suffix.lower() == ".onnx" and not output.is_dir():
        return output
    if output.exists() and not output.is_dir():
        raise UsageError(f"output={one_line(output)}: expected a folder, or a file that ends in .onnx")
    return output / "lenet.onnx"


def _images(data: FashionMNISTDataModule) -> tuple[Tensor, Tensor | None]:
    """Returns the test images, uint8 ``[N, 1, 28, 28]``, with their labels, or 1,000 random images without labels."""
    try:
        if data.test_set is None:
            data.prepare_data()
            data.setup("test")
    except DataError:
        return torch.randint(256, (1000, 1, 28, 28), dtype=torch.uint8, generator=generator(0)), None
    assert data.test_set is not None
    return data.test_set


def _onnx(classifier: Classifier, metadata: dict[str, str]) -> bytes:
    """Returns the content of the ONNX file."""
    import onnx

    example = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)  # two images, because one would become a constant
    shapes = {"images": {0: torch.export.Dim("N")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about their own steps
        program = torch.export.export(_WithProbabilities(classifier), (example,), dynamic_shapes=shapes)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it names folders of this machine
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=OUTPUTS, dynamic_shapes=shapes
        )
    assert exported is not None
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    content: bytes = proto.SerializeToString()
    return content


def _run(content: bytes, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits and probabilities, ``[N, 10]`` each, as ONNX Runtime computes them from a file's content."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    batches = [images[:1], images[1:8], *images[8:].split(EVAL_BATCH_SIZE)]  # with N = 1 and an odd N
    outputs = [session.run(OUTPUTS, {"images": batch.numpy()}) for batch in batches]
    logits, probabilities = zip(*outputs, strict=True)
    return torch.cat([torch.from_numpy(x) for x in logits]), torch.cat([torch.from_numpy(x) for x in probabilities])
