"""``export``: each file computes what the checkpoint's net computes and says what it is, or there is no file."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEST, inside
from PIL import Image

import lenet_pl
from lenet_pl import FashionMNISTDataModule, LeNet5, LitLeNet, __version__, checkpoint, download
from lenet_pl.__main__ import main
from lenet_pl.apps import export
from lenet_pl.datamodule import FashionMNIST

TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--data.mean", 0.25, "--data.std", 0.5)
BEST = Path("runs/lenet/version_0/checkpoints/best.ckpt")
OPTIONAL = ["onnx", "onnxruntime", "onnxscript", "safetensors"]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A checkpoint of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    with inside(folder, tiny) as patch:
        patch.setattr("lenet_pl.commands.report", lambda *args: None)
        options = ("--model.lr", 0.0005, "--model.dropout", 0.1, "--trainer.max_epochs", 2)
        assert main(["fit", *map(str, (*TINY, *options))]) == 0
    return folder / BEST


@pytest.fixture
def run(cli, trained):
    """Exports into the current folder; returns exit code, stdout and stderr."""
    return lambda *args: cli("export", "--ckpt_path", trained, "--output", ".", *args)


def pixels(n=TEST):
    return FashionMNIST("data", train=False).data[:n].unsqueeze(1)


def expected(path, images, **settings):
    """Returns logits and probabilities of Lightning's module, from the checkpoint."""
    state = checkpoint.load(path)
    model = LitLeNet(**state["hyper_parameters"] | settings).eval()
    model.load_state_dict(state["state_dict"])
    data = state["datamodule_hyper_parameters"]
    with torch.no_grad():
        logits = model((images / 255 - data["mean"]) / data["std"])
    return logits, logits.softmax(-1)


def session(path="lenet.onnx"):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def onnx_outputs(images, path="lenet.onnx"):
    outputs = session(path).run(["logits", "probabilities"], {"images": images.numpy()})
    return tuple(map(torch.from_numpy, outputs))


def need(format):
    for package in export.FORMATS[format][0].split():
        pytest.importorskip(package, reason="the extra export is not installed")


def close(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def check_metadata(metadata, path):
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    images, labels = pixels(), FashionMNIST("data", train=False).targets
    accuracy = float(metadata.pop("test_accuracy"))
    assert accuracy == pytest.approx(float((expected(path, images)[0].argmax(1) == labels).double().mean()), abs=5e-5)
    assert 0.1 < accuracy < 1
    assert json.loads(metadata.pop("classes")) == FashionMNIST.classes
    assert metadata == {
        "mean": "0.25",
        "std": "0.5",
        "variant": "article",
        "tta": "none",
        "lenet_pl": __version__,
        "checkpoint_sha256": sha256,
    }
    return accuracy


def test_onnx_is_one_sound_file_that_computes_what_the_module_computes(run, trained):
    need("onnx")
    import onnx
    import onnxruntime

    code, out, err = run()
    assert (code, err) == (0, "")
    _, size, parity, accuracy, use = out.splitlines()  # and nothing of the exporter's own
    file = Path("lenet.onnx")
    assert size == f"lenet.onnx: {file.stat().st_size / 1000:.0f} kB"
    assert re.fullmatch(rf"{TEST} test images: same class for {TEST}, .* of logits \d\.\de-0[5-9]", parity)
    used = eval(use.removeprefix("use: "), {"onnxruntime": onnxruntime, "pixels": pixels(7).numpy()})
    close(map(torch.from_numpy, used), expected(trained, pixels(7)))
    assert sorted(p.name for p in Path().iterdir()) == ["data", "lenet.onnx"]  # no external weights, no leftovers

    proto = onnx.load(file)
    onnx.checker.check_model(proto, full_check=True)
    assert str(ROOT).encode() not in file.read_bytes()  # a stack trace would name this machine's folders
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert accuracy == f"Test accuracy: {check_metadata(metadata, trained):.2%}"
    (images,), outputs = session().get_inputs(), session().get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", 1, 28, 28])
    assert [(o.name, o.type, o.shape) for o in outputs] == [
        ("logits", "tensor(float)", ["N", 10]),
        ("probabilities", "tensor(float)", ["N", 10]),
    ]
    for n in (1, 7, 53):
        close(onnx_outputs(pixels(n)), expected(trained, pixels(n)))


def test_safetensors_hold_the_evaluated_weights(run, trained):
    need("safetensors")
    import safetensors.torch

    code, out, err = run("--format", "safetensors")
    assert (code, err, len(out.splitlines())) == (0, "", 5)
    load, make, pixel = re.split(r"  # |, which takes ", out.splitlines()[-1].removeprefix("use: "))
    names = {"safetensors": safetensors, "lenet_pl": lenet_pl, "pixels": pixels()}
    exec(f"{make}\n{load}\nx = {pixel}", names)
    with torch.no_grad():
        close([names["net"].eval()(names["x"])], expected(trained, pixels())[:1])
    with safetensors.safe_open("lenet.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        check_metadata(file.metadata(), trained)
    assert weights.keys() == LeNet5().state_dict().keys()
    for name, weight in weights.items():
        assert torch.equal(weight, checkpoint.load(trained)["state_dict"][f"net.{name}"])


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_pt2_needs_no_optional_package_and_no_code_of_ours(run, trained, tta, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    code, out, err = run("--format", "pt2", "--model.tta", tta)
    assert (code, err, len(out.splitlines())) == (0, "", 5)
    extra = {"metadata.json": ""}
    program = torch.export.load("lenet.pt2", extra_files=extra).module()
    for n in (1, 7, 53):
        with torch.no_grad():
            close(program(pixels(n)), expected(trained, pixels(n), tta=tta))
    assert str(ROOT).encode() not in Path("lenet.pt2").read_bytes()
    metadata = json.loads(extra["metadata.json"])
    assert metadata["tta"] == tta
    if tta == "none":
        check_metadata(metadata, trained)


def test_onnx_of_the_classic_net_trained_in_bfloat16_and_flipped(cli, workdir):
    need("onnx")
    options = ("--model.variant", "classic", "--model.tta", "flip", "--trainer.precision", "bf16-true")
    code, _, err = cli("fit", *TINY, *options, "--trainer.max_epochs", 2)
    assert code == 0, err
    code, _, err = cli("export", "--model.tta", "flip")
    assert (code, err) == (0, "")
    file = BEST.with_name("lenet.onnx")  # beside the checkpoint
    metadata = session(file).get_modelmeta().custom_metadata_map
    assert (metadata["variant"], metadata["tta"]) == ("classic", "flip")
    wanted = expected(BEST, pixels())
    close(onnx_outputs(pixels(), file), wanted)
    assert (wanted[0] - expected(BEST, pixels(), tta="none")[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("output", "file"),
    [("new/folder", "new/folder/lenet.safetensors"), ("new/my.safetensors", "new/my.safetensors")],
)
def test_output_is_a_folder_or_a_file(cli, trained, output, file):
    need("safetensors")
    code, out, err = cli("export", "--ckpt_path", trained, "--format", "safetensors", "--output", output)
    assert (code, err) == (0, "")
    assert f"{file}: " in out
    assert [str(p) for p in Path("new").rglob("*") if p.is_file()] == [file]


def test_onnx_goes_to_the_file_named(run):
    need("onnx")
    assert run("--output", "my.onnx", "--data.images", "data/../pictures")[0] == 2  # no such folder
    Path("pictures").mkdir()
    Image.new("L", (28, 28)).save("pictures/a.png")
    code, out, _ = run("--output", "my.onnx", "--data.images", "pictures")
    assert code == 0
    assert f"{TEST} test images" in out  # pictures prove nothing
    assert session("my.onnx")


def test_output_of_another_format_is_wrong_use(run, workdir):
    code, _, err = run("--format", "pt2", "--output", "my.onnx")
    assert code == 2
    assert err == "error: output=my.onnx: expected a folder, or a file that ends in .pt2, for --format pt2\n"
    assert [p.name for p in workdir.iterdir()] == ["data"]


def test_a_place_that_cannot_be_written_is_named(run):
    need("safetensors")
    Path("taken").write_text("mine")
    code, _, err = run("--format", "safetensors", "--output", "taken/deeper")
    assert code == 1
    assert err.startswith("error: taken/deeper: Not a directory")
    assert Path("taken").read_text() == "mine"


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_without_the_data_random_images_prove_it(run, format, monkeypatch):
    need(format)
    monkeypatch.setattr(download, "SOURCES", ())
    monkeypatch.delenv("LENET_PL_DATA_SOURCE", raising=False)
    code, out, err = run("--data.data_dir", "none", "--format", format)
    assert (code, err) == (0, "")
    assert "1,000 random images: same class for 1,000, " in out
    assert "could not be had, so no accuracy was measured" in out
    assert "Test accuracy" not in out
    assert b"test_accuracy" not in Path(f"lenet.{format}").read_bytes()


@pytest.mark.parametrize("package", OPTIONAL)
def test_a_missing_package_is_named_with_its_extra(run, workdir, package, monkeypatch):
    real = export.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == package else real(name))
    monkeypatch.setattr(FashionMNISTDataModule, "prepare_data", lambda self: pytest.fail("work was done before"))
    format = "onnx" if "onnx" in package else package
    for name in set(OPTIONAL) - {package}:
        pytest.importorskip(name, reason="the extra export is not installed")
    code, _, err = run("--format", format)
    assert code == 2
    remedy = "which is not installed; install it with: pip install '.[export]'"
    assert err == f"error: export --format {format} needs {package}, {remedy}\n"
    assert [p.name for p in workdir.iterdir()] == ["data"]


def test_without_any_optional_package_the_rest_works(spawn, trained):
    prelude = f"sys.modules.update(dict.fromkeys({OPTIONAL}))"  # None: importing them fails
    process = spawn("export", "--ckpt_path", trained, "--output", ".", "--format", "pt2", prelude=prelude)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert Path("lenet.pt2").exists()


@pytest.mark.parametrize("format", ["onnx", "safetensors", "pt2"])
def test_a_file_that_differs_is_not_written(run, format, monkeypatch):
    need(format)
    file = Path(f"lenet.{format}")
    file.write_text("the old one")
    real = LitLeNet.forward
    monkeypatch.setattr(LitLeNet, "forward", lambda self, images: real(self, images) + 2e-4)
    code, out, err = run("--format", format)
    assert code == 1
    assert re.search(rf"classifies {TEST} of {TEST} images like the checkpoint and differs by up to 2\.\de-04", err)
    assert "lenet." not in out
    assert file.read_text() == "the old one"
    assert sorted(p.name for p in Path().iterdir()) == ["data", file.name]


def test_another_class_another_probability_or_nan_is_a_difference(run, monkeypatch):
    real = export.Classifier.forward

    def broken(change):
        monkeypatch.setattr(export.Classifier, "forward", lambda self, images: change(*real(self, images)))
        code, _, err = run("--format", "pt2")
        assert not Path("lenet.pt2").exists()
        return code, err

    code, err = broken(lambda logits, probabilities: (logits, probabilities + 2e-4))
    assert code == 1
    assert "2.0e-04" in err
    assert broken(lambda logits, probabilities: (logits, probabilities * float("nan")))[0] == 1
    monkeypatch.setattr(export, "TOLERANCE", 100)
    code, err = broken(lambda logits, probabilities: (-logits, probabilities))
    assert code == 1
    assert "classifies 0 of" in err


def test_a_wrong_format_lists_the_right_ones(run, workdir):
    code, _, err = run("--format", "tflite")
    assert code == 2
    assert all(word in err for word in ("format", "tflite", "onnx", "safetensors", "pt2"))
    assert len(err.splitlines()) <= 3
    assert [p.name for p in workdir.iterdir()] == ["data"]


@pytest.mark.data
def test_on_the_real_data_onnx_has_the_accuracy_of_test(real_data, capsys):
    need("onnx")
    options = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]  # quick, not good
    assert main(["fit", "--config", str(ROOT / "configs/fast.yaml"), *options]) == 0
    capsys.readouterr()
    assert main(["export", "--ckpt_path", "best"]) == 0
    folder = Path("runs/fast/version_0")
    out, result = capsys.readouterr().out, json.loads((folder / "test.json").read_text())
    assert "10,000 test images: same class for 10,000" in out
    assert f"Test accuracy: {result['test_acc']:.2%}" in out
    metadata = session(folder / "checkpoints/lenet.onnx").get_modelmeta().custom_metadata_map
    assert float(metadata["test_accuracy"]) == result["test_acc"]
