"""A user's picture → the 28×28 grey on black that the net was trained on.

The steps are those that made the data set: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for
Benchmarking Machine Learning Algorithms" (2017), arXiv 1708.07747, section 2. Its input was 51×73 thumbnails of one
shop on near-white. What is done otherwise lets other pictures in, or was measured ("kept": the share of 1,000 test
images, blown up to 280×280, inverted, as JPEG, to which two trained nets gave the same label as before: 99.2 %):

- Rows and columns are averaged, not skipped: skipping makes a large photo jagged.
- Sharpening is gentler than the paper's words suggest (30 %, not 80 %, of the difference from the blurred picture).
  The data set is sharp already: at 80 %, 98.3 % were kept, at 0 %, 98.1 %; drawings of garments fared alike.
- A picture laid out like the data set, from edge to edge and centred to a pixel, is not trimmed (else 97.0 % kept);
  one of 28×28 is at most negated.
- The background becomes black whatever grey it was: with 22 % grey left there, 61 % of the labels stayed.
"""

import math
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, ImageStat, UnidentifiedImageError

SIDE = 28
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # not EPS: Pillow would run Ghostscript on it


def find(path: str | Path) -> list[Path]:
    """Returns a file as it is, or the pictures in a folder and its subfolders, sorted.

    Raises:
        ValueError: If nothing is there, or no picture in the folder.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give a picture or a folder of pictures")
    found = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file()]
    if not found:
        raise ValueError(f"{path}: no pictures in this folder; expected files named {' '.join(sorted(SUFFIXES))}")
    return sorted(found)


def load(path: Path) -> Image.Image:
    """Opens a picture: its first frame, turned as its EXIF says; a large JPEG at 1/2 to 1/8 of its size.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no picture, damaged, or above Pillow's limit against decompression bombs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata in a picture that can be read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as picture:
                picture.draft(None, (1024, 1024))  # at least so large: a photo is decoded several times faster
                return ImageOps.exif_transpose(picture)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"picture too large: over {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down") from None
    except UnidentifiedImageError:
        raise ValueError(f"not a picture, or none of {', '.join(_FORMATS)}; convert it to PNG") from None
    except Exception as error:  # on damaged files the decoders raise anything from SyntaxError to struct.error
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"damaged picture: {error}; save it again") from error


def to_uint8(picture: Image.Image, preprocess: bool = True) -> torch.Tensor:
    """Turns a picture of any mode and size into a data-set image.

    Args:
        picture: As ``load`` returns it.
        preprocess: False: only to grey and to 28×28, for pictures that are prepared already.

    Returns:
        ``[1, 28, 28]``, uint8, 0 = black background.
    """
    picture = flatten(picture)
    grey = picture.convert("L")
    if not preprocess:
        grey = grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    elif picture.size == (SIDE, SIDE):
        grey = ImageOps.invert(grey) if background(grey)[0] > 127 else grey
    else:  # the paper centres before it negates: the same, but for an edge of the background's colour
        grey = centre(negate(sharpen(resize(trim(picture), SIDE)).convert("L"), background(grey)[0]))
    return torch.from_numpy(np.array(grey)[None])


def flatten(picture: Image.Image) -> Image.Image:
    """Brings any mode to RGB: 16-bit and float grey to 8 bits, what is transparent onto a background.

    White, as behind the data set's garments; black behind garments so light (from 225) that the net finds more of
    them there. A 28×28 picture is taken for a data-set image with a mask, and the mask is dropped.
    """
    if picture.mode[0] in "IF":  # I, I;16, I;16B, F: the largest value tells the scale
        values = np.nan_to_num(np.asarray(picture, np.float32)).clip(0)
        top = next((top for top in (1, 255, 65535) if values.max() <= top), values.max())
        return Image.fromarray((values * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    opaque, alpha = picture.convert("RGB"), picture.getchannel("A")
    grey = opaque.convert("L")
    darkest, lightest = grey.getextrema()
    if picture.size == (SIDE, SIDE) and darkest != lightest:  # if equal, the mask is the image
        return opaque
    light = alpha.getbbox() is not None and ImageStat.Stat(grey, mask=alpha).mean[0] > 225
    backdrop = Image.new("RGB", picture.size, "black" if light else "white")
    backdrop.paste(opaque, mask=alpha)
    return backdrop


def resize(picture: Image.Image, longest: int) -> Image.Image:
    """Brings the longest edge to so many pixels and keeps the proportions; no edge ends below one pixel."""
    width, height = (max(1, round(edge * longest / max(picture.size))) for edge in picture.size)
    return picture.resize((width, height), Image.Resampling.HAMMING, reducing_gap=3.0)


def _overview(picture: Image.Image) -> Image.Image:
    """At most 112 pixels long: noise and JPEG's blocks are averaged out, a garment still shows where it ends."""
    return resize(picture, min(max(picture.size), 4 * SIDE))


def background(picture: Image.Image) -> list[float]:
    """Returns the colour of the corners, a value per channel: their median, so one covered corner does no harm."""
    pixels = np.atleast_3d(np.asarray(_overview(picture)))  # [height, width, channels]
    return [float(value) for value in np.median(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)]


def trim(picture: Image.Image) -> Image.Image:
    """Cuts edges within 5 % of the background's colour (root mean square over red, green and blue)."""
    colour = background(picture)
    for _ in range(2):  # the second look is closer
        small = _overview(picture)
        far = np.square(np.asarray(small, np.float32) - colour).mean(2) > (0.05 * 255) ** 2  # [height, width]
        box = Image.fromarray(far.astype(np.uint8)).filter(ImageFilter.MedianFilter(3)).getbbox()  # no specks
        if box is None:
            return picture
        left, top, right, bottom = box
        shift = max(abs(left + right - small.width), abs(top + bottom - small.height)) / 2
        free = small.width - max(right - left, bottom - top)
        if small.width == small.height and max(shift, free) <= small.width / SIDE:
            return picture  # laid out like the data set, to one of its pixels
        x, y = picture.width / small.width, picture.height / small.height
        picture = picture.crop((int(left * x), int(top * y), math.ceil(right * x), math.ceil(bottom * y)))
    return picture


def sharpen(picture: Image.Image) -> Image.Image:
    """Sharpens with a Gaussian of standard deviation 1.0: nothing on even ground, most near outlines."""
    return picture.filter(ImageFilter.UnsharpMask(radius=1.0, percent=30, threshold=0))


def negate(grey: Image.Image, background: float) -> Image.Image:
    """Negates where the background is lighter than the mean, then stretches the levels from background to 255."""
    values = np.asarray(grey, np.float32)
    if values.mean() < background:
        values, background = 255 - values, 255 - background
    values = (values - background) * (255 / max(1, 255 - background))
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def centre(grey: Image.Image) -> Image.Image:
    """Centres on 28×28 black; of an odd margin the larger half is left or above, as in the data set."""
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(grey, ((SIDE - grey.width + 1) // 2, (SIDE - grey.height + 1) // 2))
    return canvas
