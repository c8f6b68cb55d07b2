"""``export``: the file computes what the checkpoint's net computes and says what it is, or there is no file."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEST, as_pretrained, inside

from lenet_pl import FashionMNISTDataModule, LitLeNet, __version__, checkpoint, download
from lenet_pl.__main__ import main
from lenet_pl.apps import export
from lenet_pl.datamodule import FashionMNIST

TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--data.mean", 0.25, "--data.std", 0.5)
BEST = Path("runs/lenet/version_0/checkpoints/best.ckpt")
OPTIONAL = ["onnx", "onnxruntime", "onnxscript"]


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
def pretrained(trained, tmp_path_factory, monkeypatch):
    """A checkpoint that holds weights alone, in the place of the one that comes with the package."""
    return as_pretrained(trained, tmp_path_factory.mktemp("package"), monkeypatch)


@pytest.fixture
def run(cli, trained):
    """Exports into the current folder; returns exit code, stdout and stderr."""
    return lambda *args: cli("export", "--ckpt_path", trained, "--output", ".", *args)


def pixels(n=TEST):
    return FashionMNIST("data", train=False).data[:n].unsqueeze(1)


def expected(path, images):
    """Returns the logits of Lightning's module, from the checkpoint."""
    state = checkpoint.load(path)
    model = LitLeNet(**state["hyper_parameters"]).eval()
    model.load_state_dict(state["state_dict"])
    data = state["datamodule_hyper_parameters"]
    with torch.no_grad():
        return model((images / 255 - data["mean"]) / data["std"])


def session(path="lenet.onnx"):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'lenet_pl[export]'")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def onnx_outputs(images, path="lenet.onnx"):
    return torch.from_numpy(session(path).run(["logits"], {"images": images.numpy()})[0])


@pytest.fixture
def packages():
    """Skips the test where the optional packages are not installed."""
    for package in OPTIONAL:
        pytest.importorskip(package, reason="needs the extra: pip install 'lenet_pl[export]'")


@pytest.fixture(scope="module")
def exported():
    """The files that were exported before, by their metadata."""
    return {}


@pytest.fixture
def quick(packages, exported, monkeypatch):
    """Exports a net only once for the tests of this file that are about something else."""
    real = export._onnx

    def once(classifier, metadata):
        key = str(metadata)
        if key not in exported:
            exported[key] = real(classifier, metadata)
        return exported[key]

    monkeypatch.setattr(export, "_onnx", once)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def check_metadata(metadata, path):
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    images, labels = pixels(), FashionMNIST("data", train=False).targets
    accuracy = float(metadata.pop("test_accuracy"))
    assert accuracy == pytest.approx(float((expected(path, images).argmax(1) == labels).double().mean()), abs=5e-5)
    assert 0.1 < accuracy < 1
    assert json.loads(metadata.pop("classes")) == FashionMNIST.classes
    assert metadata == {
        "variant": "article",
        "lenet_pl": __version__,
        "checkpoint_sha256": sha256,
    }
    return accuracy


def test_it_is_one_sound_file_that_computes_what_the_module_computes(run, trained, packages):
    import onnx
    import onnxruntime

    code, out, err = run()
    assert (code, err) == (0, "")
    _, size, parity, accuracy, use = out.splitlines()  # and nothing of the exporter's own
    file = Path("lenet.onnx")
    assert size == f"lenet.onnx: {file.stat().st_size / 1000:.0f} kB"
    assert re.fullmatch(rf"{TEST} test images: same class for all, .* difference \d\.\de-0[5-9]", parity)
    used = eval(use.removeprefix("use: "), {"onnxruntime": onnxruntime, "pixels": pixels(7).numpy()})
    close(torch.from_numpy(used[0]), expected(trained, pixels(7)))
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
    ]
    for n in (1, 7, 53):
        close(onnx_outputs(pixels(n)), expected(trained, pixels(n)))


@pytest.mark.long
def test_the_classic_net_trained_in_bfloat16(cli, workdir, packages):
    options = ("--model.variant", "classic", "--trainer.precision", "bf16-true")
    code, _, err = cli("fit", *TINY, *options, "--trainer.max_epochs", 2)
    assert code == 0, err
    code, _, err = cli("export")
    assert (code, err) == (0, "")
    file = BEST.with_name("lenet.onnx")  # beside the checkpoint
    metadata = session(file).get_modelmeta().custom_metadata_map
    assert metadata["variant"] == "classic"
    close(onnx_outputs(pixels(), file), expected(BEST, pixels()))


@pytest.mark.parametrize(
    ("output", "file"),
    [
        ("new/my.ONNX", "new/my.ONNX"),
        pytest.param("new/folder.1", "new/folder.1/lenet.onnx", marks=pytest.mark.long),
        pytest.param("new/[/b]", "new/[/b]/lenet.onnx", marks=pytest.mark.long),
    ],
)
def test_output_is_a_folder_or_a_file(cli, trained, quick, output, file):
    code, out, err = cli("export", "--ckpt_path", trained, "--output", output)
    assert (code, err) == (0, "")
    assert f"{file}: " in out
    assert [str(p) for p in Path("new").rglob("*") if p.is_file()] == [file]


def test_a_name_that_is_no_utf_8_is_shown(cli, trained, quick):
    folder = Path(os.fsdecode(b"new\xff\n"))
    folder.mkdir()
    code, out, err = cli("export", "--ckpt_path", shutil.copy(trained, folder / "best.ckpt"))
    assert (code, err) == (0, "")
    assert r"new\xff\n/lenet.onnx: " in out
    assert eval(re.search(r"Session\((.*?)\)", out)[1]) == str(folder / "lenet.onnx")
    assert session((folder / "lenet.onnx").read_bytes())  # onnxruntime itself opens no such path


def test_it_goes_to_the_file_named(run, quick):
    code, out, _ = run("--output", "my.onnx")
    assert code == 0
    assert f"{TEST} test images" in out
    assert session("my.onnx")


def test_output_of_another_kind_is_wrong_use(run, workdir, packages):
    (workdir / "my.txt").write_text("mine")
    code, _, err = run("--output", "my.txt")
    assert code == 2
    assert err == "error: output=my.txt: expected a folder, or a file that ends in .onnx\n"
    assert sorted(p.name for p in workdir.iterdir()) == ["data", "my.txt"]
    assert (workdir / "my.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named(run, quick):
    Path("taken").write_text("mine")
    code, _, err = run("--output", "taken/deeper")
    assert code == 1
    assert err.startswith("error: taken/deeper: Not a directory")
    assert Path("taken").read_text() == "mine"


def test_without_the_data_nothing_is_written(run, packages, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", ())
    monkeypatch.delenv("LENET_PL_DATA_SOURCE", raising=False)
    code, _, err = run("--data.data_dir", "none")
    assert code == 1
    assert err.startswith("error: Fashion-MNIST could not be fetched")
    assert not Path("lenet.onnx").exists()


def test_the_pretrained_checkpoint_is_exported_into_the_current_folder(cli, pretrained, packages):
    code, out, err = cli("export", "--ckpt_path", "pretrained")
    assert (code, err) == (0, "")
    assert "\nlenet.onnx: " in out
    assert [path.name for path in pretrained.parent.iterdir()] == ["pretrained.ckpt"]
    close(onnx_outputs(pixels()), expected(pretrained, pixels()))


@pytest.mark.parametrize("package", OPTIONAL)
def test_a_missing_package_is_named_with_its_extra(run, workdir, package, monkeypatch):
    real = export.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == package else real(name))
    monkeypatch.setattr(FashionMNISTDataModule, "prepare_data", lambda self: pytest.fail("work was done before"))
    for name in set(OPTIONAL) - {package}:
        pytest.importorskip(name, reason="needs the extra: pip install 'lenet_pl[export]'")
    code, _, err = run()
    assert code == 2
    remedy = "which is not installed; install it with: pip install 'lenet_pl[export]'"
    assert err == f"error: export needs {package}, {remedy}\n"
    assert [p.name for p in workdir.iterdir()] == ["data"]


@pytest.mark.long
def test_without_any_optional_package_the_rest_works(spawn, trained):
    prelude = f"sys.modules.update(dict.fromkeys({OPTIONAL}))"  # None: importing them fails
    process = spawn("test", "--ckpt_path", trained, prelude=prelude)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")


def test_a_file_that_differs_is_not_written(run, packages, monkeypatch):
    file = Path("lenet.onnx")
    file.write_text("the old one")
    real = LitLeNet.forward
    monkeypatch.setattr(LitLeNet, "forward", lambda self, images: real(self, images) + 2e-4)
    code, out, err = run()
    assert code == 1
    assert re.search(rf"classifies {TEST} of {TEST} images like the checkpoint and differs by up to 2\.\de-04", err)
    assert "lenet." not in out
    assert file.read_text() == "the old one"
    assert sorted(p.name for p in Path().iterdir()) == ["data", file.name]


def test_another_class_or_nan_is_a_difference(run, quick, monkeypatch):
    real = export._run

    def broken(change):
        monkeypatch.setattr(export, "_run", lambda content, images: change(real(content, images)))
        code, _, err = run()
        assert not Path("lenet.onnx").exists()
        return code, err

    code, err = broken(lambda logits: logits + 2e-4)
    assert code == 1
    assert "2.0e-04" in err
    assert broken(lambda logits: logits * float("nan"))[0] == 1
    monkeypatch.setattr(export, "TOLERANCE", 100)
    code, err = broken(lambda logits: -logits)
    assert code == 1
    assert "classifies 0 of" in err


@pytest.mark.data
def test_on_the_real_data_onnx_has_the_accuracy_of_test(real_data, packages, capsys):
    options = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]  # quick, not good
    assert main(["fit", "--config", str(ROOT / "configs/fast.yaml"), *options]) == 0
    capsys.readouterr()
    assert main(["export", "--ckpt_path", "best"]) == 0
    folder = Path("runs/fast/version_0")
    out, result = capsys.readouterr().out, json.loads((folder / "test.json").read_text())
    assert "10,000 test images: same class for all" in out
    assert f"Test accuracy: {result['test_acc']:.2%}" in out
    metadata = session(folder / "checkpoints/lenet.onnx").get_modelmeta().custom_metadata_map
    assert float(metadata["test_accuracy"]) == result["test_acc"]
