"""The exported image processor makes the pixels of training, of whatever an image comes as."""

import base64
import io
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aki_megatron.checkpoint.image_processing_aki import FORMATS as EXPORTED_FORMATS
from aki_megatron.checkpoint.image_processing_aki import AkiImageProcessor
from aki_megatron.data.image import FORMATS, ImageOptions, UnreadableImage, decode_image, normalize

SIZE = 12
OPTIONS = [ImageOptions(), ImageOptions("white", exif_rotation=True)]
NOISE = np.random.default_rng(0).integers(0, 256, (23, 31, 4), dtype=np.uint8)


def processor(options: ImageOptions = OPTIONS[0], size: int = SIZE) -> AkiImageProcessor:
    return AkiImageProcessor({"height": size, "width": size}, options.transparency, options.exif_rotation)


def pixels(image: Any, options: ImageOptions = OPTIONS[0], size: int = SIZE) -> torch.Tensor:
    """What the image processor gives for one image."""
    return processor(options, size)(image, return_tensors="pt")["pixel_values"]


def trained(data: bytes | Path, options: ImageOptions = OPTIONS[0], size: int = SIZE) -> torch.Tensor:
    return normalize([decode_image(data, size, key="", options=options)], size)


def encoded(image: Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(NOISE[..., :3]), "JPEG", exif=exif)


def tiff_of_12_bits() -> bytes:
    """Grey of a microscope, two samples in three bytes: 0x800, 0x123, ..."""
    row = bytes([0x80, 0x01, 0x23]) * 12
    tags = [(256, 3, 24), (257, 3, 24), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1),
            (278, 3, 24), (279, 4, 24 * len(row))]  # fmt: skip
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + row * 24


FILES = {
    "RGB": encoded(Image.fromarray(NOISE[..., :3])),
    "RGBA": encoded(Image.fromarray(NOISE)),
    "grey": encoded(Image.fromarray(NOISE[..., 0])),
    "grey and alpha": encoded(Image.fromarray(NOISE).convert("LA")),
    "palette": encoded(Image.fromarray(NOISE).quantize(16)),
    "transparent palette": encoded(Image.fromarray(NOISE[..., :3]).quantize(16), transparency=3),
    "transparent color": encoded(Image.new("RGB", (9, 9), (1, 2, 3)), transparency=(1, 2, 3)),
    "16-bit grey": encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200)),
    "transparent 16-bit grey": encoded(
        Image.fromarray(np.repeat([[900, 40000]], 9, 0).astype(np.uint16)), transparency=900
    ),
    "12-bit grey": tiff_of_12_bits(),
    "16-bit PPM": b"P5 31 23 65535\n" + (NOISE[..., 0].astype(">u2") * 200).tobytes(),
    "CMYK": encoded(Image.fromarray(NOISE[..., :3]).convert("CMYK"), "JPEG"),
    "WEBP": encoded(Image.fromarray(NOISE), "WEBP"),
    "rotated": rotated(),
    "of the encoder's size": encoded(Image.fromarray(NOISE[:SIZE, :SIZE, :3])),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_training(name: str, options: ImageOptions, tmp_path: Path) -> None:
    data, path = FILES[name], tmp_path / "image"
    path.write_bytes(data)
    expected = trained(data, options)
    text = base64.b64encode(data).decode()
    forms = (data, path, str(path), text, f"data:image/png;base64,{text}", Image.open(path))
    for image in forms:
        assert torch.equal(pixels(image, options), expected), type(image)
    if name in ("RGBA", "transparent palette", "transparent color", "transparent 16-bit grey", "rotated"):
        assert not torch.equal(expected, trained(data, OPTIONS[options == OPTIONS[0]])), "the options matter"


def test_arrays_and_tensors_are_images() -> None:
    rgb, rgba, grey = NOISE[..., :3], NOISE, NOISE[..., 0]
    wide = grey.astype(np.uint16) * 200
    expected = trained(FILES["RGB"])
    fractions = torch.from_numpy(rgb.astype(np.float32) / 255)
    for image in (
        rgb,
        rgb.transpose(2, 0, 1),
        rgb.astype(np.int64),
        fractions.numpy(),
        torch.from_numpy(rgb.copy()),
        torch.from_numpy(rgb.copy()).permute(2, 0, 1),
        fractions.permute(2, 0, 1),
        fractions.double(),
    ):
        assert torch.equal(pixels(image), expected)
    assert torch.equal(pixels(rgba, OPTIONS[1]), trained(FILES["RGBA"], OPTIONS[1]))
    assert torch.equal(pixels(NOISE[..., :2]), pixels(Image.fromarray(np.ascontiguousarray(NOISE[..., :2]), "LA")))
    for image in (grey, grey[..., None], torch.from_numpy(grey.copy())[None]):
        assert torch.equal(pixels(image), trained(FILES["grey"]))
    for image in (wide, torch.from_numpy(wide)):
        assert torch.equal(pixels(image), trained(FILES["16-bit grey"]))
    # of a shape that may be both, numpy has the channels last and torch first
    cube = NOISE[:3, :7, :3]
    assert torch.equal(pixels(cube), pixels(Image.fromarray(cube)))
    assert torch.equal(pixels(torch.from_numpy(cube.copy())), pixels(Image.fromarray(cube.transpose(1, 2, 0))))


def test_several_images_come_in_lists_lists_of_lists_and_stacks() -> None:
    images = [np.roll(NOISE[..., :3], shift, axis=0) for shift in range(3)]
    expected = torch.cat([pixels(image) for image in images])
    stack = np.stack(images)
    for given in (images, tuple(images), [images[:1], images[1:]], [[], images], stack, torch.from_numpy(stack)):
        assert torch.equal(pixels(given), expected)
    assert processor()([])["pixel_values"].shape == processor()(None)["pixel_values"].shape == (0, 3, SIZE, SIZE)
    found = processor()(images[0])["pixel_values"]
    assert isinstance(found, np.ndarray) and found.dtype == np.float32


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 6, 7), np.uint8), r"shape \(5, 6, 7\); give \[H, W\]"),
        (np.zeros(7, np.uint8), r"shape \(7,\)"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\)"),
        (NOISE[..., :3].astype(np.float32), "float32 values in .* whose range is not known"),
        (-torch.ones(3, 8, 8), "whose range is not known"),
        (torch.full((3, 8, 8), float("nan")), "whose range is not known"),
        (np.full((8, 8, 3), 256), "int64 values in"),
        (np.zeros((8, 8, 3), bool), "bool values"),
        (Image.fromarray(NOISE[..., 0].astype(np.int32)), "32-bit grey"),
        (Image.fromarray(NOISE[..., 0].astype(np.float32)), "32-bit grey"),
        ("no such file.png", "no such file.png is no file, no URL and no base64"),
        (3.5, "float is no image"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor()(image)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="AkiImageProcessor has no crop_size, do_normalize"):
        processor()(NOISE, do_normalize=False, crop_size=3, do_resize=True, data_format=None)
    with pytest.raises(ValueError, match="must be a square"):
        AkiImageProcessor({"height": 3, "width": 4})
    with pytest.raises(ValueError, match="transparency='black' is unknown; choose 'ignore' or 'white'"):
        AkiImageProcessor(transparency="black")
    assert AkiImageProcessor(7).size == {"height": 7, "width": 7}
    assert AkiImageProcessor.model_input_names == ["pixel_values"]


def test_only_the_formats_of_training_are_read() -> None:
    assert EXPORTED_FORMATS == FORMATS
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UnreadableImage):
        trained(program)
    with pytest.raises(OSError, match="cannot identify"):
        pixels(program)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_url_is_read_as_the_file_is(server: str, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(FILES["rotated"])
    for options in OPTIONS:
        assert torch.equal(pixels(f"{server}/photo.jpg", options), trained(FILES["rotated"], options))


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    processor(OPTIONS[1]).save_pretrained(tmp_path)
    again = AkiImageProcessor.from_pretrained(tmp_path)
    assert (again.size, again.transparency, again.exif_rotation) == ({"height": SIZE, "width": SIZE}, "white", True)
