"""The page of ``demo``, in a real browser: what it shows, whom it asks, how it ends, and what stops it early."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import inside
from PIL import Image

from lenet_pl import FashionMNISTDataModule, LitLeNet
from lenet_pl.__main__ import main
from lenet_pl.apps import demo
from lenet_pl.datamodule import FashionMNIST
from lenet_pl.pictures import prepare
from lenet_pl.pictures.files import load

FIT = ("--data.val_size", "60", "--data.batch_size", "8", "--trainer.max_epochs", "4")
RATIO = "image => image.decode().then(() => image.naturalWidth / image.naturalHeight)"
WATCH = """
def watch(event, args):  # whom the process calls, and where it listens
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        print(event, args[1] if event != "socket.getaddrinfo" else args[0], file=sys.stderr, flush=True)
sys.addaudithook(watch)
"""


browser_test = pytest.mark.long  # it takes many seconds until a browser shows the page


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A current folder with the tiny data, for all tests of this file."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "tmp").mkdir()
    with inside(folder, tiny) as patch:
        patch.setattr("lenet_pl.commands.report", lambda *args: None)
        yield folder


@pytest.fixture(scope="module")
def ckpt(place):
    torch.set_num_threads(1)
    assert main(["fit", *FIT]) == 0
    return place / "runs/lenet/version_0/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def net(ckpt):
    """Works out the ten probabilities of a picture file apart from the page."""
    state = torch.load(ckpt, weights_only=True)
    model = LitLeNet(**state["hyper_parameters"])
    model.load_state_dict(state["state_dict"])
    model.eval()

    def probabilities(path):
        x = prepare.to_uint8(load(path))[None].float() / 255
        with torch.inference_mode():
            return model((x - 0.2860) / 0.3530).softmax(1)[0].tolist()

    return probabilities


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def start(ckpt, place, tiny):
    """Starts the command in a process of its own, and waits until it says that it is ready."""
    if find_spec("gradio") is None:
        pytest.skip("needs gradio: pip install 'lenet_pl[demo]'")
    started = []

    def run(*flags, prelude=""):
        port = free_port()
        code = "import sys; from lenet_pl import download; from lenet_pl.__main__ import main\n"
        code += f"download.FILES = {tiny[1]!r}\n{WATCH}{prelude}\nsys.exit(main(sys.argv[1:]))"
        env = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "TMPDIR": str(place / "tmp")}
        env |= {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "GRADIO_SHARE": "True"}
        env |= {"GRADIO_ANALYTICS_ENABLED": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}  # wishes that must not count
        command = [sys.executable, "-c", code, "demo", "--ckpt_path", str(ckpt), "--port", str(port), *flags]
        process = subprocess.Popen(
            command, cwd=place, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        process.url = f"http://127.0.0.1:{port}"
        assert process.stdout.readline() == f"checkpoint: {ckpt}\n", process.communicate()[1]
        assert process.stdout.readline() == f"demo: {process.url} (Ctrl-C ends it)\n", process.communicate()[1]
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def end(process, signum):
    """Returns the exit code, and all that the process printed since it was ready. It has to end within 20 s."""
    process.send_signal(signum)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def server(start):
    return start()


@pytest.fixture(scope="module")
def tab(server, browser):
    """The page, opened; ``tab.log`` gets what it requests and complains of."""
    tab = browser.new_page(viewport={"width": 900, "height": 800})
    tab.set_default_timeout(10_000)
    tab.log = []
    tab.on("request", lambda request: tab.log.append(request.url))
    tab.on("pageerror", lambda error: tab.log.append(str(error)))
    tab.on("console", lambda message: tab.log.append(message.text) if message.type == "error" else None)
    tab.goto(server.url)
    example(tab, "Ankle boot").wait_for()
    yield tab
    tab.close()


def bars(tab):
    """Returns the ten probabilities on the page, in the order of the classes."""
    found = tab.locator("meter").evaluate_all(
        "all => all.map(bar => [bar.ariaLabel, Number(bar.getAttribute('value'))])"
    )
    return [dict(found).get(name) for name in FashionMNIST.classes]


def shows(tab, probabilities):
    for _ in range(100):
        if bars(tab) == pytest.approx(probabilities, abs=1e-5):
            break
        tab.wait_for_timeout(50)
    assert bars(tab) == pytest.approx(probabilities, abs=1e-5)
    assert tab.get_by_role("alert").count() == 0


def example(tab, name):
    return tab.locator("#examples").get_by_role("button", name=name)


def upload(tab, path):
    tab.locator("#picture input[type=file]").set_input_files(path)


@pytest.fixture(scope="module")
def files(place):
    """Pictures of four kinds: as in the data set, a photo on its side, 16 bits, a transparent drawing."""
    ramp = np.linspace(0, 65535, 60 * 40).reshape(60, 40)
    photo = Image.new("RGB", (300, 200), "white")
    photo.paste((160, 20, 60), (40, 60, 260, 150))
    turned = Image.Exif()
    turned[0x0112] = 6
    drawing = Image.new("RGBA", (90, 120))
    drawing.paste((0, 90, 0, 255), (20, 10, 50, 110))
    Image.fromarray(ramp.astype(np.uint8).repeat(2, 1)[:28, :28]).save(place / "set.png")
    photo.save(place / "photo.jpg", exif=turned)
    Image.fromarray(ramp.astype(np.uint16)).save(place / "deep.tiff")
    drawing.save(place / "drawing.webp")
    return {name: place / name for name in ("set.png", "photo.jpg", "deep.tiff", "drawing.webp")}


@browser_test
def test_an_example(tab, net, place):
    images, labels = FashionMNISTDataModule("data")._read(train=False)
    for label, name in ((7, "Sneaker"), (0, "T-shirt/top")):
        first = images[labels == label][0, 0].numpy()
        Image.fromarray(first).save(place / "first.png")
        example(tab, name).click()
        shows(tab, net(place / "first.png"))
        for alt in ("As given", "28×28 grey pixels"):
            source = tab.get_by_alt_text(alt).get_attribute("src")
            with Image.open(io.BytesIO(tab.request.get(source).body())) as picture:
                assert picture.size == (560, 560)
                assert np.array_equal(np.asarray(picture.convert("L"))[10::20, 10::20], first)


@browser_test
@pytest.mark.parametrize("name", ["set.png", "photo.jpg", "deep.tiff", "drawing.webp"])
def test_an_upload(tab, net, files, name):
    upload(tab, files[name])
    shows(tab, net(files[name]))
    ratio = tab.get_by_alt_text("As given").evaluate(RATIO)
    with load(files[name]) as picture:
        assert ratio == pytest.approx(picture.width / picture.height, rel=0.01)


@browser_test
@pytest.mark.parametrize(
    ("event", "name"),
    [("ClipboardEvent('paste', {clipboardData:", "photo.jpg"), ("DragEvent('drop', {dataTransfer:", "set.png")],
)
def test_paste_and_a_drop_beside_the_box(tab, net, files, event, name):
    tab.evaluate(
        f"""bytes => {{
          const data = new DataTransfer()
          data.items.add(new File([new Uint8Array(bytes)], "{name}"))
          document.body.dispatchEvent(new {event} data, bubbles: true, cancelable: true}}))
        }}""",
        list(files[name].read_bytes()),
    )
    shows(tab, net(files[name]))


@browser_test
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.png", b"no picture", "text.png: not a picture"),
        ("<b>cut.png", None, "damaged picture"),
        ("notes.txt", b"", "notes.txt: not a picture"),
        ("a$b$ &amp; :smile:.png", b"", "a$b$ &amp; :smile:.png: not a picture"),
    ],
)
def test_a_wrong_file_gets_a_message_and_the_next_one_works(tab, net, files, place, name, content, message):
    noise = Image.effect_noise((50, 50), 99)
    noise.save(place / "noise.png")
    (place / name).write_bytes((place / "noise.png").read_bytes()[:300] if content is None else content)
    upload(tab, place / name)
    tab.get_by_role("alert").filter(has_text=message).wait_for()
    assert tab.locator("meter").count() == 0
    assert tab.get_by_alt_text("As given").count() == 0
    upload(tab, files["photo.jpg"])
    shows(tab, net(files["photo.jpg"]))


@browser_test
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("light", 900), ("dark", 390)])
def test_the_look(tab, scheme, width):
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 800})
    tab.reload()
    example(tab, "Bag").click()
    tab.get_by_alt_text("As given").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert min(paper) > 240 if scheme == "light" else max(paper) < 40
    for alt in ("As given", "28×28 grey pixels"):
        image = tab.get_by_alt_text(alt)
        assert image.evaluate(RATIO) == 1
        box, frame = image.bounding_box(), image.locator("xpath=ancestor::*[contains(@class, 'shown')]").bounding_box()
        assert min(box["width"], box["height"]) > 130
        assert box["y"] + box["height"] <= frame["y"] + frame["height"]  # whole
        assert box["y"] > frame["y"] + 20  # below its title
        assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"


@browser_test
def test_the_browser_asks_nobody_else(tab, server):
    assert len(tab.log) > 20
    assert [
        entry for entry in tab.log if not entry.startswith((f"{server.url}/", "data:", f"blob:{server.url}/"))
    ] == []


@browser_test
def test_sigterm_ends_it_with_the_page_open(tab, server, place):  # the last test with these two
    assert any((place / "tmp").iterdir())
    code, out, err = end(server, signal.SIGTERM)
    assert (code, out) == (143, "")
    assert err == f"socket.bind ('127.0.0.1', {server.url.split(':')[-1]})\n"  # no other address, and no call to anyone
    assert not any((place / "tmp").iterdir())
    assert not (place / ".gradio").exists()
    socket.create_server(("127.0.0.1", int(server.url.split(":")[-1]))).close()


@pytest.mark.long
def test_no_test_images_and_ctrl_c(start, browser, net, files):
    process = start("--data.data_dir", "nothing", prelude="download.SOURCES = ()")
    tab = browser.new_page()
    tab.goto(process.url)
    tab.get_by_role("alert").filter(has_text="There are no examples").wait_for()
    assert example(tab, "Bag").count() == 0
    upload(tab, files["set.png"])
    shows(tab, net(files["set.png"]))
    tab.close()
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    code, out, err = end(process, signal.SIGINT)  # pressed twice
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert "Fashion-MNIST could not be fetched" in err


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_is_none(ckpt, capsys, monkeypatch, port):
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    assert main(["demo", "--ckpt_path", str(ckpt), "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"error: port={port}: expected an integer from 1 to 65535, such as --port 7860\n"


def test_a_port_in_use(ckpt, capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["demo", "--ckpt_path", str(ckpt), "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err == f"error: port={port}: address already in use; choose another --port\n"


def test_without_gradio(ckpt, capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo", "--ckpt_path", str(ckpt), "--port", "0"]) == 2
    assert capsys.readouterr().err == (
        "error: demo needs gradio, which is not installed; install it with: pip install 'lenet_pl[demo]'\n"
    )
