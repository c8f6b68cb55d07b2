"""``demo``: a page on this machine alone that classifies pictures; needs the extra ``demo``, and no internet."""

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

from lenet_pl.apps import pictures
from lenet_pl.datamodule import FashionMNIST, FashionMNISTDataModule
from lenet_pl.download import DataError
from lenet_pl.errors import UsageError
from lenet_pl.loader import normalise
from lenet_pl.module import LitLeNet

SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
TITLE = "LeNet-5 on Fashion-MNIST"
SIDE = 560  # pixels that a picture is brought to for show
# Paste, or drop beside the box, is handed to the box.
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
.image-container { box-sizing: border-box; padding-top: 28px }  /* or the title hides pixels */
#examples img { width: 40px; height: 40px }
#examples button { justify-content: start; padding: 4px }
[role=alert] { border-left: 4px solid #d55e00; margin: 0; padding: 4px 12px }
"""


def serve(model: LitLeNet, data: FashionMNISTDataModule, port: int) -> None:
    """Serves the page on 127.0.0.1 until Ctrl-C or SIGTERM, which it leaves to the caller's handlers.

    Args:
        model: The net, with its weights.
        data: Says how pictures are prepared; its test images give the examples. The page works without them.
        port: TCP port, 1 to 65535.

    Raises:
        UsageError: If Gradio is not installed, or the port cannot be had.
    """
    if find_spec("gradio") is None:
        raise UsageError("demo needs gradio, which is not installed; install it with: pip install '.[demo]'")
    if not 1 <= port <= 65535:
        raise UsageError(f"port={port}: expected an integer from 1 to 65535, such as --port 7860")
    try:
        server = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        hint = f"choose another one, such as --port {8000 if port < 8000 else 7860}"
        raise UsageError(f"port={port}: {os.strerror(error.errno or 0).lower()}; {hint}") from error
    with server, TemporaryDirectory(prefix="lenet_pl-") as folder:
        os.environ |= SETTINGS | {"GRADIO_TEMP_DIR": folder}  # before Gradio is imported; the folder gets the uploads
        import uvicorn  # Gradio's own server; run by hand, it lets the caller's signal handlers be

        page = _page(model.eval(), data, Path(folder))
        config = uvicorn.Config(page, log_config=None, log_level="critical", timeout_graceful_shutdown=1)
        print(f"demo: http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
        uvicorn.Server(config).run(sockets=[server])


def _page(model: LitLeNet, data: FashionMNISTDataModule, folder: Path) -> Any:
    """Builds the page as a web application; the examples are written to ``folder``."""
    import gradio as gr
    from fastapi import FastAPI

    examples: dict[str, str] = {}  # class: file
    about, problem = "What garment is it? The net knows ten kinds, and nothing else.", ""
    try:
        data.prepare_data()
        data.setup("test")
    except DataError as error:
        problem = "No examples: the test images are missing. The terminal says why."
        print(error, file=sys.stderr)
    if data.test_set:
        for label, name in enumerate(FashionMNIST.classes):
            examples[name] = str(folder / f"{label}.png")
            Image.fromarray(data.test_set[0][data.test_set[1] == label][0, 0].numpy()).save(examples[name])
        with torch.inference_mode():
            right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.test_dataloader())
        total = len(data.test_set[1])
        about += f" It is right on {right / total:.2%} of the {total:,} test images."

    def alert(text: str) -> gr.HTML:
        return gr.HTML(f'<p role="alert">{html.escape(text)}</p>', visible=bool(text), elem_id="message", padding=False)

    def classify(path: str) -> list[Any]:
        try:
            picture = pictures.load(Path(path))
            given, seen = pictures.flatten(picture), pictures.to_uint8(picture, data.preprocess)  # [1, 28, 28]
        except (OSError, ValueError) as error:
            return [None, None, None, alert(f"{Path(path).name}: {error}"), None]
        with torch.inference_mode():
            shares = model(normalise(seen[None], data.mean, data.std)).softmax(1)[0].tolist()  # [10]
        label = dict(zip(FashionMNIST.classes, shares, strict=True))
        return [_enlarged(given), _enlarged(Image.fromarray(seen[0].numpy())), label, alert(""), None]

    look: dict[str, Any] = {"format": "png", "interactive": False, "buttons": [], "height": 260, "min_width": 120}
    with gr.Blocks(title=TITLE) as blocks:
        gr.Markdown(f"# {TITLE}\n{about}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                file = gr.File(label="Drop, choose or paste a picture", height=150, elem_id="picture")
                message = alert(problem)
                gr.Markdown("or see a test image:", visible=bool(examples))
                with gr.Group(elem_id="examples", visible=bool(examples)), gr.Row():
                    keys = {name: gr.Button(name, icon=examples[name], size="sm", min_width=120) for name in examples}
            with gr.Column(scale=3, min_width=280):
                with gr.Row():
                    given = gr.Image(label="The picture", alt_text="As given", elem_classes="shown", **look)
                    seen = gr.Image(
                        label="What the net sees", alt_text="28×28 grey pixels", elem_classes="shown", **look
                    )
                shares = gr.Label(label="Probabilities", num_top_classes=10)
        shown = [given, seen, shares, message, file]  # the file's box is emptied: ready for the next one
        file.upload(classify, file, shown, api_visibility="private")
        for name, key in keys.items():
            key.click(partial(classify, examples[name]), None, shown, api_visibility="private")
    fonts = ["system-ui", "sans-serif"]  # none to be fetched
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None), blocks, "/", footer_links=[], run_history=False, ssr_mode=False, mcp_server=False,
        theme=gr.themes.Base(font=fonts, font_mono=fonts), js=SCRIPT, css=CSS,
    )  # fmt: skip


def _enlarged(picture: Image.Image) -> Image.Image:
    times = SIDE // max(picture.size)  # whole, so that pixels stay square
    return ImageOps.scale(picture, times, Image.Resampling.NEAREST) if times else pictures.resize(picture, SIDE)
