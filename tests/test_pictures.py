import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn

from lenet_pl.apps import plots
from lenet_pl.lenet import LeNet5
from lenet_pl.pictures import files
from lenet_pl.pictures.files import SUFFIXES, find, load
from lenet_pl.pictures.prepare import background, centre, flatten, negate, resize, sharpen, to_uint8, trim

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def draw(box, size, ground=WHITE, ink=BLACK, mode="RGB"):
    """A filled rectangle; the box's right and bottom edges are outside, as in Image.crop."""
    picture = Image.new(mode, size, ground)
    ImageDraw.Draw(picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=ink)
    return picture


def garment(seed=0):
    """A data-set image: trousers, 28 high, 12 wide, the larger half of no margin; each pixel its own grey."""
    pixels = np.random.default_rng(seed).integers(60, 255, (28, 28), dtype=np.uint8)
    pixels[:, :8] = pixels[:, 20:] = pixels[9:, 13:15] = 0
    return pixels


def stored(picture, tmp_path, name, **options):
    picture.save(tmp_path / name, **options)
    return load(tmp_path / name)


def pixels_of(picture):
    seen = to_uint8(picture)
    assert (seen.shape, seen.dtype) == ((1, 28, 28), torch.uint8)
    return seen[0].numpy().astype(int)


# --- the steps ---


def test_background_is_the_median_of_the_corners():
    picture = draw((0, 0, 30, 30), (200, 100), ground=(250, 240, 230))
    assert background(picture) == [250, 240, 230]
    assert background(picture.convert("L")) == [242]


@pytest.mark.parametrize("size", [(60, 50), (300, 200), (777, 555), (1000, 3000), (3000, 2000)])
def test_trim_cuts_to_the_garment(size):
    box = (size[0] // 5, size[1] // 10, size[0] // 2, size[1] // 2)
    width, height = box[2] - box[0], box[3] - box[1]
    slack = max(width, height) // 50  # half of one of the 28 pixels
    trimmed = trim(draw(box, size)).size
    assert width <= trimmed[0] <= width + slack
    assert height <= trimmed[1] <= height + slack


@pytest.mark.parametrize(("difference", "size"), [(10, (300, 200)), (16, (150, 100))])
def test_trim_takes_five_per_cent_for_the_background(difference, size):
    faint = (255 - difference,) * 3
    picture = draw((75, 50, 225, 150), (300, 200), ink=faint)
    assert trim(picture).size == pytest.approx(size, abs=3)


def test_trim_is_not_fooled_by_jpeg_noise_and_dust(tmp_path):
    noise = np.random.default_rng(0).normal(0, 8, (600, 800, 3))
    picture = draw((300, 100, 500, 400), (800, 600), ground=(235, 235, 235))
    for speck in ((20, 20, 26, 26), (700, 550, 706, 556), (780, 300, 786, 306)):
        ImageDraw.Draw(picture).rectangle(speck, fill=BLACK)
    picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
    assert trim(stored(picture, tmp_path, "photo.jpg", quality=40)).size == pytest.approx((200, 300), abs=8)


def test_trim_leaves_what_is_laid_out_like_the_data_set():
    almost = draw((90, 5, 190, 280), (280, 280))  # half of one of the 28 pixels is free above
    assert trim(almost).size == (280, 280)
    assert trim(draw((90, 40, 190, 280), (280, 280))).size == pytest.approx((100, 240), abs=3)
    assert trim(draw((90, 90, 190, 190), (280, 280))).size == pytest.approx((100, 100), abs=3)
    assert trim(draw((20, 0, 120, 280), (280, 280))).size == pytest.approx((100, 280), abs=3)


def test_trim_leaves_an_even_picture():
    assert trim(Image.new("RGB", (40, 30), "red")).size == (40, 30)


@pytest.mark.parametrize(
    ("size", "expected"), [((56, 28), (28, 14)), ((7, 14), (14, 28)), ((1, 5000), (1, 28)), ((1, 1), (28, 28))]
)
def test_resize_brings_the_longest_edge_to_28(size, expected):
    assert resize(Image.new("RGB", size), 28).size == expected


def test_resize_averages_where_skipping_would_alias():
    stripes = np.zeros((560, 560), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(resize(Image.fromarray(stripes), 28))
    assert 120 < small[:, 2:-2].min() <= small[:, 2:-2].max() < 136


def test_sharpen_acts_at_outlines_only():
    picture = draw((0, 0, 14, 28), (28, 28), ground=(150,) * 3, ink=(100,) * 3)
    row = np.asarray(sharpen(picture))[14, :, 0].astype(int)
    assert (row[:10] == 100).all()
    assert (row[18:] == 150).all()
    assert row[13] < 98
    assert row[14] > 152


@pytest.mark.parametrize("ground", [255, 253, 200, 140])
def test_negate_turns_a_light_background_black(ground):
    grey = draw((10, 10, 20, 20), (28, 28), ground, ground // 4, "L")
    seen = np.asarray(negate(grey, ground))
    assert seen[0, 0] == 0
    assert seen[15, 15] == pytest.approx(255 * 3 / 4, abs=2)


@pytest.mark.parametrize("ground", [0, 3, 90, 140])
def test_negate_leaves_a_garment_lighter_than_its_background(ground):
    seen = np.asarray(negate(draw((10, 10, 20, 20), (28, 28), ground, 255, "L"), ground))
    assert (seen[0, 0], seen[15, 15]) == (0, 255)


def test_negate_of_an_even_picture_is_black():
    assert not np.asarray(negate(Image.new("L", (28, 28), 255), 255.0)).any()


@pytest.mark.parametrize(
    ("size", "corner"), [((28, 28), (0, 0)), ((12, 28), (8, 0)), ((13, 28), (8, 0)), ((28, 9), (0, 10))]
)
def test_centre_puts_the_larger_margin_left_and_above(size, corner):
    left, top = corner
    assert centre(Image.new("L", size, 255)).getbbox() == (left, top, left + size[0], top + size[1])


@pytest.mark.parametrize(
    "values",
    [
        garment().astype(np.uint16) * 257,  # mode I;16
        garment().astype(np.int32) * 257,  # mode I
        garment().astype(np.int32),  # 8-bit values in a larger type
        garment().astype(np.float32) / 255,
    ],
    ids=["16-bit", "32-bit", "8 in 32", "float"],
)
def test_flatten_scales_deep_grey_exactly(values):
    flat = flatten(Image.fromarray(values))
    assert flat.mode == "RGB"
    assert (np.asarray(flat)[:, :, 1] == garment()).all()


def test_flatten_survives_values_that_are_none():
    values = np.full((5, 5), np.nan, np.float32)
    assert not np.asarray(flatten(Image.fromarray(values))).any()


@pytest.mark.parametrize(("ink", "ground"), [(0, 255), (128, 255), (220, 255), (235, 0), (255, 0)])
def test_flatten_lays_alpha_on_white_but_on_black_what_is_too_light(ink, ground):
    picture = draw((10, 10, 30, 30), (40, 40), (0, 0, 0, 0), (ink, ink, ink, 255), "RGBA")
    flat = flatten(picture)
    assert (flat.getpixel((0, 0)), flat.getpixel((20, 20))) == ((ground,) * 3, (ink,) * 3)


def test_flatten_of_nothing_visible_is_white():
    assert flatten(Image.new("RGBA", (9, 9))).getextrema() == ((255, 255),) * 3


# --- whole pictures ---


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_a_data_set_image_passes_unchanged(mode, tmp_path):
    picture = Image.fromarray(garment()).convert(mode)
    assert (pixels_of(stored(picture, tmp_path, "image.png")) == garment()).all()


def masked(ink, mask):
    picture = Image.fromarray(ink)
    picture.putalpha(Image.fromarray(mask))
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        ImageOps.invert(Image.fromarray(garment())),
        masked(255 - garment(), (garment() > 0).astype(np.uint8) * 255),
        masked(garment() * 0 + 255, garment()),
        masked(garment() * 0, garment()),
    ],
    ids=["inverted", "inverted masked", "white ink", "black ink"],
)
def test_a_data_set_image_inverted_or_transparent_comes_back(picture, tmp_path):
    assert (pixels_of(stored(picture, tmp_path, "image.png")) == garment()).all()


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {"quality": 60}),
        ("a.jpg", "L", {}),
        ("a.jpg", "CMYK", {}),
        ("a.png", "RGB", {}),
        ("a.png", "P", {}),
        ("a.png", "LA", {}),
        ("a.webp", "RGB", {"quality": 60}),
        ("a.webp", "RGBA", {"lossless": True}),
        ("a.gif", "P", {}),
        ("a.bmp", "RGB", {}),
        ("a.tiff", "CMYK", {"compression": "tiff_lzw"}),
        ("a.tif", "I;16", {}),
        ("a.tif", "F", {}),
        ("a.png", "1", {}),
    ],
)
def test_every_format_and_mode_shows_the_same_trousers(name, mode, options, tmp_path):
    picture = draw((150, 60, 300, 560), (600, 800))
    ImageDraw.Draw(picture).rectangle((200, 200, 250, 559), fill=WHITE)  # between the legs
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    seen = pixels_of(stored(picture if mode == "I;16" else picture.convert(mode), tmp_path, name, **options))
    assert (seen[:, 11:13] > 200).all()  # the left leg, from top to bottom
    assert (seen[:7, 11:18] > 200).all()  # the waist
    assert (seen[10:, 14] < 60).all()
    assert (seen[:, :9] < 8).all()
    assert (seen[:, 20:] < 8).all()


@pytest.mark.parametrize("ground", [WHITE, (225, 205, 180), (170, 180, 175)])
def test_a_photo_on_a_wall_has_a_black_background(ground):
    noise = np.random.default_rng(0).normal(0, 6, (600, 800, 3))
    picture = np.asarray(draw((200, 200, 600, 500), (800, 600), ground, (90, 30, 40))) + noise
    seen = pixels_of(Image.fromarray(picture.clip(0, 255).astype(np.uint8)))
    assert (seen[:3].max(), seen[25:].max()) < (12, 12)
    assert seen[5:23].min() > 120


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 5000), (27, 28), (28, 28), (5000, 113)])
def test_any_mode_and_size_gives_an_image(mode, size):
    picture = Image.new(mode, size)
    assert np.ptp(pixels_of(picture)) == 0  # even all over: nothing but background


def test_a_very_large_picture():
    seen = pixels_of(draw((2000, 1000, 4000, 5000), (8000, 6000), 255, 0, "L"))
    assert (seen[1:27, 8:20] > 240).all()
    assert seen[0].max() > 150
    assert seen[27].max() > 150
    assert not seen[:, :6].any()


# --- files ---


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_load_turns_as_exif_says(name, tmp_path):
    upright = draw((0, 0, 100, 20), (100, 200))  # black on top
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    picture = stored(upright.transpose(Image.Transpose.ROTATE_90), tmp_path, name, exif=exif)
    assert picture.size == (100, 200)
    assert picture.convert("L").getpixel((50, 5)) < 10


def test_load_reads_past_damaged_exif(tmp_path):
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xfe" * 40)
    assert load(tmp_path / "a.jpg").size == (30, 30)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tif", "a.png"])
def test_load_takes_the_first_frame(name, tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    picture = stored(frames[0], tmp_path, name, save_all=True, append_images=frames[1:])
    assert picture.convert("RGB").getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=4)


def test_load_decodes_a_large_jpeg_at_a_fraction(tmp_path):
    assert stored(Image.new("RGB", (6000, 4500)), tmp_path, "a.jpg").size == (1500, 1125)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_load_refuses_what_is_cut_short(name, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for share in (0, 0.02, 0.5):
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"damaged picture|not a picture"):
            load(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_load_of_flipped_bytes_gives_a_picture_or_an_error(suffix, tmp_path):
    buffer, rng, file = io.BytesIO(), np.random.default_rng(0), tmp_path / "damaged"
    format_ = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix)
    Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(buffer, format_)
    errors = 0
    for _ in range(60):
        data = np.frombuffer(buffer.getvalue(), np.uint8).copy()
        data[rng.integers(0, min(200, len(data)), 3)] = rng.integers(0, 256, 3)
        file.write_bytes(data.tobytes())
        try:
            pixels_of(load(file))
        except (OSError, ValueError):
            errors += 1
    assert errors > 0


def test_load_refuses_what_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(ValueError, match="not a picture, or none of BMP, GIF, JPEG, PNG, TIFF, WEBP"):
        load(tmp_path / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.eps")
    with pytest.raises(ValueError, match="not a picture"):  # Pillow would start Ghostscript on it
        load(tmp_path / "b.eps")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.png")


@pytest.mark.parametrize("edge", [110, 150], ids=["where Pillow warns", "where Pillow raises"])
def test_load_refuses_a_decompression_bomb(edge, tmp_path, monkeypatch):
    Image.new("1", (edge, edge)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(files, "MAX_PIXELS", 10_000)
    with pytest.raises(ValueError, match="picture too large: over 10,000 pixels"):
        load(tmp_path / "bomb.png")


def png_header(size):
    """The beginning of a grey PNG of this size; its pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\1\0IDAT"
    )


def test_load_reads_the_largest_photos_of_phones_but_no_bomb(tmp_path):
    photo = draw((3000, 1000, 6000, 8000), (12_000, 9_000), 250, 20, "L")
    before = Image.MAX_IMAGE_PIXELS
    assert stored(photo, tmp_path, "photo.jpg", quality=50).size == (1500, 1125)
    assert before == Image.MAX_IMAGE_PIXELS  # Pillow's limit is the whole process's
    for size, message in (((16_320, 12_240), "damaged"), ((60_000, 60_000), r"too large: over 250,000,000 pixels")):
        (tmp_path / "a.png").write_bytes(png_header(size))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "a.png")


@pytest.mark.parametrize("compressed", [True, False])
def test_load_reads_a_png_with_much_text(tmp_path, compressed):
    text = PngImagePlugin.PngInfo()
    for i in range(3 if compressed else 70):  # Pillow's own limits: 1 MiB a text, 64 MiB together
        text.add_text(f"comment {i}", "x" * 2**20 + "y", zip=compressed)
    picture = stored(Image.fromarray(garment()), tmp_path, "a.png", pnginfo=text)
    assert (pixels_of(picture) == garment()).all()


def test_load_refuses_a_png_whose_text_is_a_bomb(tmp_path, monkeypatch):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 10_001, zip=True)
    monkeypatch.setattr(files, "MAX_TEXT", 10_000)
    with pytest.raises(ValueError, match=r"damaged picture: .*too large"):
        stored(Image.new("L", (9, 9)), tmp_path, "a.png", pnginfo=text)


def put(folder, *names):
    """Makes empty files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder, images):
    return [path.relative_to(folder).as_posix() for path in find(images)]


def test_find(tmp_path):
    put(tmp_path, "b.JPG", "a.png", "sub/c.webp", "notes.txt", "._a.png", ".hidden/e.png", "folder.png/d.gif")
    assert found(tmp_path, tmp_path) == ["a.png", "b.JPG", "folder.png/d.gif", "sub/c.webp"]
    assert find(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]


def test_find_takes_every_suffix_of_a_format_that_is_read(tmp_path):
    names = ["a.apng", "a.bmp", "a.jfif", "a.jpe", "a.jpeg", "a.jpg", "a.tif"]
    put(tmp_path, *names)
    assert found(tmp_path, tmp_path) == names
    assert {".gif", ".png", ".tiff", ".webp"} < SUFFIXES
    assert not {".eps", ".heic", ".avif", ".mpg"} & SUFFIXES


def test_find_counts_what_it_does_not_read_in_one_line(tmp_path, capsys):
    put(tmp_path, "a.png", "b.heic", "c.HEIC", "sub/d.avif", "e", ".hidden.txt")
    assert found(tmp_path, tmp_path) == ["a.png"]
    assert capsys.readouterr().out == "files that are not read: 4 (.heic 2, no suffix 1, .avif 1)\n"
    put(tmp_path, *(f"{i}.{suffix}" for i, suffix in enumerate("stuvwxyz")))
    find(tmp_path)
    assert capsys.readouterr().out.startswith("files that are not read: 12 (.heic 2, ")
    find(tmp_path / "a.png")
    assert capsys.readouterr().out == ""


def test_find_takes_several_names_and_each_picture_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "b.png", "a.png", "c.jpg", "sub/d.png", "sub/e.jpg", "[ab].png", "notes.txt")
    assert [str(path) for path in find(["sub", "b.png", "./b.png", tmp_path / "b.png"])] == [
        "sub/d.png",
        "sub/e.jpg",
        "b.png",
    ]
    assert [str(path) for path in find("[ab].png")] == ["[ab].png"]  # no pattern
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/a.png") == [tmp_path / "a.png"]


def test_find_leaves_out_what_this_program_wrote(tmp_path, capsys):
    Image.fromarray(garment()).save(tmp_path / "mine.png")
    (tmp_path / "predictions.png").write_bytes(plots.png(Figure(figsize=(1, 1))))
    assert found(tmp_path, tmp_path) == ["mine.png"]
    assert capsys.readouterr().out == "files that are not read: 1 (written by lenet_pl 1)\n"
    assert find(tmp_path / "predictions.png") == [tmp_path / "predictions.png"]  # who names it wants it
    assert found(tmp_path, [tmp_path, tmp_path / "predictions.png"]) == ["mine.png", "predictions.png"]


@pytest.mark.parametrize("name", ["nothing", "*.nothing", "a\0b", "x" * 300, "~nobody-here/a.png"])
def test_find_names_what_is_missing(tmp_path, name):
    put(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"no such file or folder; give a picture or a folder|too long"):
        find([tmp_path, tmp_path / name])


def test_find_opens_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no such file or folder"):
        find(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no pictures there"):
        find(tmp_path)


def test_find_names_a_folder_without_pictures(tmp_path):
    put(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match=r"no pictures there; expected files named \.apng \.bmp \.gif.*\(.txt 1\)"):
        find(tmp_path)
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in SUFFIXES)


# --- the round trip, on the real data ---


def classify(net, images):
    net.eval()
    with torch.no_grad():
        return net((images.float() / 255 - 0.2860) / 0.3530).argmax(1)


@pytest.fixture(scope="module")
def real():
    """A net after one epoch, and the first 100 test images [100, 28, 28]."""
    from torchvision.datasets import FashionMNIST

    root = os.environ.get("LENET_PL_TEST_DATA", "data")
    try:
        train, test = FashionMNIST(root, train=True), FashionMNIST(root, train=False)
    except RuntimeError:
        pytest.skip(f"no Fashion-MNIST in {Path(root).resolve()}; LENET_PL_TEST_DATA names another folder")
    torch.manual_seed(0)
    net, order = LeNet5(), torch.randperm(60_000)[:30_000].split(128)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, len(order))
    for batch in order:
        images = (train.data[batch, None].float() / 255 - 0.2860) / 0.3530
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), train.targets[batch]).backward()
        optimizer.step()
        schedule.step()
    assert (classify(net, test.data[:, None]) == test.targets).float().mean() > 0.8
    return net, test.data[:100].numpy()


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "change", "at_least"),
    [
        ("a.png", lambda image: Image.fromarray(image), 99),
        ("a.jpg", lambda image: Image.fromarray(255 - image).resize((280, 280)), 97),
        ("a.jpg", lambda image: Image.fromarray(255 - image).resize((280, 280), Image.Resampling.NEAREST), 97),
        ("a.png", lambda image: masked(255 - image, (image > 0).astype(np.uint8) * 255).resize((280, 280)), 97),
    ],
    ids=["png", "jpeg", "jpeg of squares", "large transparent"],
)
def test_round_trip_keeps_the_labels(real, name, change, at_least, tmp_path):
    net, images = real
    seen = torch.stack([to_uint8(stored(change(image), tmp_path, name)) for image in images])
    same = classify(net, seen) == classify(net, torch.from_numpy(images)[:, None])
    assert int(same.sum()) >= at_least


def test_a_pattern_where_nothing_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "c.txt", "[a].png"):
        Path(name).write_bytes(b"")
    assert find("*.png") == [Path("[a].png"), Path("a.png"), Path("b.png")]
    assert find("[a].png") == [Path("[a].png")]  # a name that exists is no pattern
    assert find(["b.png", "*.png"]) == [Path("b.png"), Path("[a].png"), Path("a.png")]
    with pytest.raises(ValueError, match=r"\*\.jpg: no such file"):
        find("*.jpg")
