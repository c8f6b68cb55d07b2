"""A trained net as a file for other programs, written only after it classified the test images like the checkpoint."""

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from lenet_pl import __version__
from lenet_pl.atomic import write_atomic
from lenet_pl.datamodule import FashionMNIST, FashionMNISTDataModule
from lenet_pl.download import DataError
from lenet_pl.errors import UsageError
from lenet_pl.lenet import LeNet5
from lenet_pl.loader import EVAL_BATCH_SIZE, generator, normalise
from lenet_pl.module import LitLeNet

TOLERANCE = 1e-4  # of a logit or a probability: float32 sums in another order differ by some 1e-5
FORMATS = {  # the packages that each needs, and how to use its file
    "onnx": (
        "onnx onnxruntime onnxscript",
        "onnxruntime.InferenceSession({!r}).run(None, {{'images': pixels}})  # uint8 [N, 1, 28, 28]",
    ),
    "safetensors": (
        "safetensors",
        "net.load_state_dict(safetensors.torch.load_file({!r}))"
        "  # net = lenet_pl.LeNet5({variant!r}), which takes (pixels / 255 - {mean}) / {std}",
    ),
    "pt2": ("", "logits, probabilities = torch.export.load({!r}).module()(pixels)  # uint8 [N, 1, 28, 28]"),
}


class Classifier(nn.Module):
    """The net from pixels to probabilities, without Lightning.

    Args:
        net: The net, in evaluation mode.
        mean: Pixel mean, as in the datamodule.
        std: Pixel standard deviation, likewise.
        flip: Whether to average the logits of an image and its mirror image.
    """

    def __init__(self, net: LeNet5, mean: float, std: float, flip: bool) -> None:
        super().__init__()
        self.net, self.mean, self.std, self.flip = net, mean, std, flip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classifies uint8 images, ``[N, 1, 28, 28]``; returns logits and probabilities, ``[N, 10]`` each."""
        x = normalise(images, self.mean, self.std)
        logits = (self.net(x) + self.net(x.flip(-1))) / 2 if self.flip else self.net(x)
        return logits, logits.softmax(-1)


@torch.no_grad()
def write(ckpt_path: Path, model: LitLeNet, data: FashionMNISTDataModule, format: str, output: str | None) -> Path:
    """Exports what ``model`` computes in evaluation mode, and prints the file, the proof and the accuracy.

    The metadata, all text: ``classes`` (a JSON list), ``mean``, ``std``, ``variant``, ``tta``, ``checkpoint_sha256``,
    ``lenet_pl`` (the version) and, where the test images can be had, ``test_accuracy`` (0 to 1).

    Args:
        ckpt_path: The checkpoint's file.
        model: Its module, with the weights loaded; left in evaluation mode.
        data: With the checkpoint's settings; reads the test images if it has not yet.
        format: ``"onnx"`` and ``"pt2"`` hold a ``Classifier``, ``"safetensors"`` the float32 weights of a ``LeNet5``.
        output: Folder or file; beside the checkpoint by default.

    Returns:
        The file, whole or as it was before if an error is raised.

    Raises:
        UsageError: If an optional package is missing, or ``output`` has the suffix of another format.
        RuntimeError: If a class differs, or a logit or probability by more than ``TOLERANCE``.
        OSError: If the file cannot be written.
    """
    needed, use = FORMATS[format]
    if missing := [name for name in needed.split() if find_spec(name) is None]:
        remedy = "which is not installed; install it with: pip install '.[export]'"
        raise UsageError(f"export --format {format} needs {missing[0]}, {remedy}")
    path = _path(Path(output) if output else ckpt_path.parent, format)
    images, labels = _images(data)
    pieces = [images[:1], images[1:8], *images[8:].split(EVAL_BATCH_SIZE)]  # N = 1 and odd N too
    model.eval().float()
    expected = torch.cat([model(normalise(x.to(model.device), data.mean, data.std)).cpu() for x in pieces])  # [N, 10]
    classes, variant, tta = expected.argmax(-1), model.hparams["variant"], model.hparams["tta"]
    metadata = {"classes": json.dumps(FashionMNIST.classes), "mean": str(data.mean), "std": str(data.std)}
    metadata |= {"variant": variant, "tta": tta, "lenet_pl": __version__}
    metadata["checkpoint_sha256"] = hashlib.sha256(ckpt_path.read_bytes()).hexdigest()
    if labels is not None:
        metadata["test_accuracy"] = f"{(classes == labels).double().mean():.4f}"
    net = LeNet5(variant).eval()  # contiguous float32 on the CPU, whatever the training used
    net.load_state_dict(model.net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters about their own steps
        content, classify = _build(format, Classifier(net, data.mean, data.std, tta == "flip"), metadata)
    logits, probabilities = (torch.cat(parts) for parts in zip(*map(classify, pieces), strict=True))
    same = int((logits.argmax(-1) == classes).sum())
    errors = torch.cat([logits - expected, probabilities - expected.softmax(-1)], 1).abs()  # [N, 20]
    if same < len(images) or not errors.max() <= TOLERANCE:  # not: NaN
        raise RuntimeError(
            f"the {format} file classifies {same:,} of {len(images):,} images like the checkpoint and differs by up to "
            f"{errors.max():.1e}; expected all of them and at most {TOLERANCE:.0e}. Nothing was written"
        )
    write_atomic(path, content)
    kind = "random" if labels is None else "test"
    print(f"{path}: {len(content) / 1000:,.0f} kB")
    difference = float(errors[:, :10].max())
    print(f"{len(images):,} {kind} images: same class for {same:,}, largest difference of logits {difference:.1e}")
    if labels is None:
        print("The test images could not be had, so no accuracy was measured; python -m lenet_pl test says why")
    else:
        print(f"Test accuracy: {float(metadata['test_accuracy']):.2%}")
    print(f"use: {use.format(str(path), **metadata)}")
    return path


def _path(output: Path, format: str) -> Path:
    suffix = output.suffix.lower()[1:]
    if output.is_dir() or (suffix not in FORMATS and not output.exists()):
        return output / f"lenet.{format}"
    if suffix != format:
        raise UsageError(f"output={output}: expected a folder, or a file that ends in .{format}, for --format {format}")
    return output


def _images(data: FashionMNISTDataModule) -> tuple[Tensor, Tensor | None]:
    """Returns the test images and labels; where they cannot be had 1,000 random images, uint8 ``[N, 1, 28, 28]``."""
    try:
        if data.test_set is None:
            data.prepare_data()
            data.setup("test")
    except DataError:
        return torch.randint(256, (1000, 1, 28, 28), dtype=torch.uint8, generator=generator(0)), None
    assert data.test_set is not None
    return data.test_set


def _build(
    format: str, model: Classifier, metadata: dict[str, str]
) -> tuple[bytes, Callable[[Tensor], Iterable[Tensor]]]:
    """Returns the file's bytes, and what these compute, read back: ``Classifier.forward``."""
    if format == "safetensors":
        from safetensors import torch as safetensors

        content = safetensors.save(model.net.state_dict(), metadata)
        model.net.load_state_dict(safetensors.load(content))
        return content, model
    example = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)  # of 2: 1 would be taken for a constant
    shapes = {"images": {0: torch.export.Dim("N")}}
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    if format == "pt2":
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata)})
        return buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module()
    import onnx
    import onnxruntime

    names = ["logits", "probabilities"]
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["images"], output_names=names, dynamic_shapes=shapes
    )
    assert exported is not None
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return content, lambda x: map(torch.from_numpy, session.run(names, {"images": x.numpy()}))
