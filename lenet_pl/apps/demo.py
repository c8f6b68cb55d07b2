"""The ``demo`` page: it classifies a user's pictures on this machine alone, without the internet."""

import html
import os
import socket
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image, ImageOps

from lenet_pl.apps.classifier import Classifier
from lenet_pl.datamodule import FashionMNIST, FashionMNISTDataModule
from lenet_pl.download import DataError
from lenet_pl.errors import UsageError
from lenet_pl.module import LitLeNet
from lenet_pl.names import one_line
from lenet_pl.pictures import files, prepare

SIDE = 560  # pixels to which a picture is enlarged for show
# Hands a pasted picture, or one that is dropped beside the box, to the box.
SCRIPT = """() => {
  const take = (event, files) => {
    const input = document.querySelector("#picture input[type=file]")
    if (!input || !files.length || event.defaultPrevented) return
    event.preventDefault()
    input.files = files
    input.dispatchEvent(new Event("change", {bubbles: true}))
  }
  addEventListener("paste", event => take(event, event.clipboardData.files))
  addEventListener("dragover", event => event.preventDefault())
  addEventListener("drop", event => take(event, event.dataTransfer.files))
}"""
CSS = """
.shown img, #examples img { image-rendering: pixelated }
.image-container { box-sizing: border-box; padding-top: 28px }  /* room for the title above the pixels */
#examples img { width: 40px; height: 40px }
#examples button { justify-content: start; padding: 4px }
[role=alert] { border-left: 4px solid #d55e00; margin: 0; padding: 4px 12px }
"""


def serve(model: LitLeNet, data: FashionMNISTDataModule, port: int) -> None:
    """Serves the page on 127.0.0.1 until Ctrl-C or SIGTERM, whose handling it leaves to the caller.

    The test images of ``data`` give the examples; where they are missing, the page works without them.

    Raises:
        UsageError: If Gradio is not installed, or if the port is out of range or taken.
    """
    if find_spec("gradio") is None:
        raise UsageError("demo needs gradio, which is not installed; install it with: pip install 'lenet_pl[demo]'")
    if not 1 <= port <= 65535:
        raise UsageError(f"port={port}: expected an integer from 1 to 65535, such as --port 7860")
    try:
        server = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UsageError(f"port={port}: {os.strerror(error.errno or 0).lower()}; choose another --port") from error
    with server, TemporaryDirectory(prefix="lenet_pl-") as folder:
        # Gradio reads these when it is imported; uploads go to the folder.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": folder}
        import uvicorn  # Gradio's own server; started here, because Gradio would replace the caller's signal handlers

        page = _page(Classifier(model.eval(), data.mean, data.std), data, Path(folder))
        config = uvicorn.Config(page, log_config=None, log_level="critical", timeout_graceful_shutdown=1)
        print(f"demo: http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
        uvicorn.Server(config).run(sockets=[server])


def _page(classifier: Classifier, data: FashionMNISTDataModule, folder: Path) -> Any:
    """Builds the page as a web application; the example pictures are written to ``folder``."""
    import gradio as gr
    from fastapi import FastAPI

    examples, problem = {}, ""
    try:
        examples = _examples(data, folder)
    except DataError as error:
        problem = "There are no examples, because the test images are missing. The terminal says why."
        print(error, file=sys.stderr)

    def alert(text: str) -> gr.HTML:
        return gr.HTML(f'<p role="alert">{html.escape(text)}</p>', visible=bool(text), elem_id="message", padding=False)

    def classify(upload: tuple[str, str]) -> list[Any]:
        path, name = upload
        try:
            return [*_examine(Path(path), classifier), alert(""), None]
        except (OSError, ValueError) as error:
            return [None, None, None, alert(f"{one_line(name)}: {error}"), None]

    look: Any = {"format": "png", "interactive": False, "buttons": [], "height": 260, "elem_classes": "shown"}
    with gr.Blocks(title="LeNet-5 on Fashion-MNIST") as page:
        gr.Markdown("# LeNet-5 on Fashion-MNIST\nWhich garment is it? The net knows ten kinds and nothing else.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                file: Any = gr.File(label="Drop, choose or paste a picture", height=150, elem_id="picture")
                message = alert(problem)
                gr.Markdown("or see a test image:", visible=bool(examples))
                with gr.Group(elem_id="examples", visible=bool(examples)), gr.Row():
                    buttons = {
                        name: gr.Button(name, icon=examples[name], size="sm", min_width=120) for name in examples
                    }
            with gr.Column(scale=3, min_width=280):
                with gr.Row():
                    given = gr.Image(label="The picture", alt_text="As given", min_width=120, **look)
                    seen = gr.Image(label="What the net sees", alt_text="28×28 grey pixels", min_width=120, **look)
                probabilities = gr.Label(label="Probabilities", num_top_classes=10)
        outputs = [given, seen, probabilities, message, file]  # the file's box is emptied for the next picture
        # Gradio's own version removes characters from the name.
        file.preprocess = lambda upload: (upload.path, upload.orig_name)
        file.upload(classify, file, outputs, api_visibility="private")
        for name, button in buttons.items():
            button.click(partial(classify, (examples[name], name)), None, outputs, api_visibility="private")
    fonts = ["system-ui", "sans-serif"]  # fonts of the machine, so that none is fetched
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None), page, "/", footer_links=[], run_history=False, ssr_mode=False, mcp_server=False,
        theme=gr.themes.Base(font=fonts, font_mono=fonts), js=SCRIPT, css=CSS,
    )  # fmt: skip


def _examples(data: FashionMNISTDataModule, folder: Path) -> dict[str, str]:
    """Writes the first test image of each class to ``folder``; returns the files by class name."""
    data.prepare_data()
    data.setup("test")
    images, labels = data.test_set
    examples = {}
    for label, name in enumerate(FashionMNIST.classes):
        path = folder / f"{label}.png"
        Image.fromarray(images[labels == label][0, 0].numpy()).save(path)
        examples[name] = str(path)
    return examples


def _examine(path: Path, classifier: Classifier) -> tuple[Image.Image, Image.Image, dict[str, float]]:
    """Returns a picture, what the net sees of it, and the probability of each class; raises what ``load`` raises."""
    picture = files.load(path)
    seen = prepare.to_uint8(picture)  # [1, 28, 28]
    with torch.inference_mode():
        probabilities = classifier(seen[None]).softmax(1)[0].tolist()  # [10]
    label = dict(zip(FashionMNIST.classes, probabilities, strict=True))
    return _enlarged(prepare.flatten(picture)), _enlarged(Image.fromarray(seen[0].numpy())), label


def _enlarged(picture: Image.Image) -> Image.Image:
    """Enlarges a small picture by a whole factor, which keeps its pixels square; shrinks one larger than ``SIDE``."""
    times = SIDE // max(picture.size)
    return ImageOps.scale(picture, times, Image.Resampling.NEAREST) if times else prepare.resize(picture, SIDE)
