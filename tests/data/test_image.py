"""Preprocessing equals its definition; an unreadable image names its file."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import image_bytes
from PIL import Image

from aki_megatron.data import image as image_module
from aki_megatron.data.image import ImageCache, ImageOptions, UnreadableImage, augment, decode_image, normalize
from aki_megatron.types import DecodedImage

# a header of 1 x 1 pixels with a palette, tRNS and data, without the palette itself
PNG_WITHOUT_PALETTE = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000000100000001080300000028cb34bb0000000174524e530040e6d8660000000a"
    "49444154789c636000000002000148afa4710000000049454e44ae426082"
)


def encoded(array: np.ndarray, form: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, format=form)
    return buffer.getvalue()


def load_image(data: bytes, size: int) -> torch.Tensor:
    return normalize([decode_image(data, size, key="")], size)[0]


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def test_pixels_are_the_bytes_mapped_to_minus_one_and_one(noise: np.ndarray) -> None:
    square = noise[:24, :24]
    pixels = load_image(encoded(square, "PNG"), 24)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 24, 24)
    expected = (torch.from_numpy(square).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)


def test_resize_ignores_the_aspect_ratio_and_equals_torchs_antialiased_bicubic(noise: np.ndarray) -> None:
    smooth = np.asarray(Image.fromarray(noise).resize((60, 90), Image.Resampling.BILINEAR))
    pixels = load_image(encoded(smooth, "PNG"), 24)
    raw = torch.from_numpy(smooth.copy()).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(raw, (24, 24), mode="bicubic", antialias=True).clamp(0, 255)[0]
    # PIL rounds to bytes after each of its two passes
    torch.testing.assert_close(pixels, (resized / 255 - 0.5) / 0.5, rtol=0, atol=2.5 / 127.5)


@pytest.mark.parametrize(
    ("form", "mode"), [("PNG", "P"), ("PNG", "L"), ("PNG", "RGBA"), ("JPEG", "CMYK"), ("JPEG", "L"), ("GIF", "P")]
)
def test_every_color_mode_becomes_rgb(noise: np.ndarray, form: str, mode: str) -> None:
    assert load_image(encoded(noise, form, mode), 24).shape == (3, 24, 24)


def test_file_and_bytes_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes(9))
    assert decode_image(tmp_path / "a.jpg", 24, key="k") == decode_image(image_bytes(9), 24, key="k")


def test_unreadable_images_name_file_and_key(tmp_path: Path) -> None:
    for name, content, what in (
        ("truncated.jpg", image_bytes(1, size=(90, 90))[:-200], r": a JPEG image that cannot be decoded \("),
        ("truncated.png", image_bytes(1, form="PNG", size=(90, 90))[:60], r": a PNG image that cannot be decoded \("),
        ("no_palette.png", PNG_WITHOUT_PALETTE, ": a PNG image that cannot be decoded .AssertionError."),
        ("text.jpg", b"not an image", r" but text that begins 'not an image'\. Read are JPEG, PNG"),
        ("page.jpg", b"<!DOCTYPE html><html>", r" but HTML \(an error page\?\)"),
        ("lfs.jpg", b"version https://git-lfs.github.com/spec/v1\n", " but a git-lfs pointer"),
        ("photo.jpg", b"\0\0\0\x18ftypheic" + bytes(80), " but a HEIC image"),
        ("head.webp", b"RIFF\0\0\0\0WEBP", " but a WEBP image; it is damaged at its beginning"),
        ("photo.psd", b"8BPS" + bytes(80), r" but a Photoshop image\. Read are"),
        ("a.jxl", b"\0\0\0\x0cJXL \r\n\x87\n", r" but a JPEG XL image\. Read are"),
        ("a.ppm", b"P6\n4 4\n255\n" + bytes(9), r": a PPM image that cannot be decoded \("),
        ("a.svg", b"<svg></svg>", r" but an SVG image\. Read are"),
        ("wide.txt", "\ufeffNot Found".encode("utf-16"), " but text in UTF-16"),
        ("zeros.jpg", bytes(900), " but zeros"),
        ("empty.png", b"", r" but empty \(0 bytes\)"),
    ):
        (tmp_path / name).write_bytes(content)
        pattern = rf"^image .*{name} of sample vqav2/x/1 is not a readable image{what}"
        with pytest.raises(UnreadableImage, match=pattern) as raised:
            decode_image(tmp_path / name, 24, key="vqav2/x/1")
        assert "0x" not in str(raised.value) and "BytesIO" not in str(raised.value)
    with pytest.raises(UnreadableImage, match=r"missing\.jpg"):
        decode_image(tmp_path / "missing.jpg", 24, key="")
    with pytest.raises(UnreadableImage, match="image of sample captions/0/1"):
        decode_image(b"\xff\xd8", 24, key="captions/0/1")


def test_damaged_bytes_never_raise_anything_else(noise: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    for form in ("PNG", "JPEG", "GIF"):
        good = encoded(noise, form)
        for _ in range(150):
            bad = bytearray(good)
            for offset in rng.integers(0, len(bad), 4):
                bad[offset] = rng.integers(0, 256)
            try:
                assert len(decode_image(bytes(bad[: rng.integers(1, len(bad) + 1)]), 24, key="k").rgb) == 3 * 24 * 24
            except UnreadableImage as error:
                assert "sample k" in str(error)


def test_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    header = png_chunks((b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", b""))
    with pytest.raises(UnreadableImage, match=r"of sample k has more than \d+ pixels \(decompression bomb\?\)"):
        decode_image(header, 24, key="k")
    with pytest.raises(UnreadableImage, match="24 x 24 pixels, more than 575 .decompression bomb"):
        decode_image(image_bytes(), 24, key="k", max_pixels=24 * 24 - 1)
    assert decode_image(image_bytes(), 24, key="k", max_pixels=24 * 24).size == 24


def test_no_images_are_an_empty_stack() -> None:
    assert normalize([], 24).shape == (0, 3, 24, 24)


def test_cache_is_bounded_and_keeps_small_images_only(tmp_path: Path) -> None:
    cache = ImageCache(24, max_bytes=2 * 3 * 24 * 24)
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(40 * number))
    first = [cache.decode(tmp_path / f"{number}.jpg", key="k") for number in range(4)]
    again = [cache.decode(tmp_path / f"{number}.jpg", key="k") for number in range(4)]
    assert first == again == [decode_image(image_bytes(40 * number), 24, key="k") for number in range(4)]
    assert [one is other for one, other in zip(first, again, strict=True)] == [True, True, False, False]
    large = ImageCache(24, max_image_bytes=1000)
    assert large.decode(image_bytes(), key="k") is not large.decode(image_bytes(), key="k")
    assert isinstance(first[0], DecodedImage)


def test_the_official_augmentation_depends_on_the_seed_alone(noise: np.ndarray) -> None:
    image = decode_image(encoded(noise, "PNG"), 24, key="k")
    before = image.rgb
    many = [augment(image, seed) for seed in range(40)]
    assert many == [augment(image, seed) for seed in reversed(range(40))][::-1] and image.rgb == before
    assert len({one.rgb for one in many}) > 35 and {one.size for one in many} == {24}


def test_the_official_augmentation_crops_then_flips() -> None:
    """Red is the column, green the row: the corners of a crop show where it was taken."""
    size = 96
    column = np.broadcast_to(np.arange(size, dtype=np.uint8), (size, size))
    ramp = DecodedImage(np.stack([column, column.T, np.zeros_like(column)], axis=-1).tobytes(), size)
    flips, areas, ratios = 0, [], []
    for seed in range(300):
        rgb = np.frombuffer(augment(ramp, seed).rgb, dtype=np.uint8).reshape(size, size, 3).astype(int)
        left, right, top, bottom = rgb[0, 0, 0], rgb[0, -1, 0], rgb[0, 0, 1], rgb[-1, 0, 1]
        flips += bool(left > right)
        width, height = abs(right - left) + 1, bottom - top + 1
        areas.append(width * height / size**2)
        ratios.append(width / height)
    assert 120 < flips < 180
    assert 0.47 < min(areas) < 0.53 and 0.97 < max(areas) <= 1.0 and 0.64 < np.mean(areas) < 0.74
    assert 0.72 < min(ratios) < 0.85 and 1.18 < max(ratios) < 1.37


def test_formats_are_read_whatever_the_suffix_says(noise: np.ndarray, tmp_path: Path) -> None:
    exact = decode_image(encoded(noise, "PNG"), 24, key="k")
    for form in ("WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000", "MPO"):
        (tmp_path / "a.jpg").write_bytes(encoded(noise, form))
        assert len(decode_image(tmp_path / "a.jpg", 24, key="k").rgb) == len(exact.rgb), form
    for form, options in (("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PPM", {})):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, format=form, **options)
        assert decode_image(buffer.getvalue(), 24, key="k") == exact, form


def test_a_pillow_without_a_format_reads_the_others(noise: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    image_module._installed_formats.cache_clear()
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    try:
        assert len(decode_image(encoded(noise, "PPM"), 24, key="k").rgb) == 3 * 24 * 24
        with pytest.raises(UnreadableImage, match="not a readable image but an AVIF image"):
            decode_image(encoded(noise, "AVIF"), 24, key="k")
    finally:
        image_module._installed_formats.cache_clear()


@pytest.mark.parametrize(("mode", "form"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "PPM")])
def test_grey_of_16_bits_keeps_its_high_byte(mode: str, form: str) -> None:
    """As 16-bit color does; Pillow's own conversion, which the released code uses, makes 256 and all above white."""
    for value, expected in ((0, 0), (300, 1), (0x8034, 0x80), (65535, 255)):
        buffer = io.BytesIO()
        Image.new(mode, (24, 24), value).save(buffer, format=form)
        assert set(decode_image(buffer.getvalue(), 24, key="k").rgb) == {expected}


def test_grey_of_12_bits_keeps_its_highest_eight() -> None:
    """TIFF of microscopes: two samples in three bytes, and Pillow gives their 12 bits."""
    row = bytes([0x80, 0x01, 0x23]) * 12  # 0x800, 0x123, ...
    tags = [(256, 3, 24), (257, 3, 24), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1),
            (278, 3, 24), (279, 4, 24 * len(row))]  # fmt: skip
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4)
    for options in (ImageOptions(), ImageOptions(exif_rotation=True)):
        rgb = decode_image(header + row * 24, 24, key="k", options=options).rgb
        assert len(header) == 122 and rgb[:6] == bytes([0x80] * 3 + [0x12] * 3)


def test_transparent_grey_of_16_bits_is_laid_on_white() -> None:
    grey, buffer = np.full((24, 24), 0x8034, dtype=np.uint16), io.BytesIO()
    grey[:12] = 7
    Image.fromarray(grey).save(buffer, format="PNG", transparency=7)
    assert set(decode_image(buffer.getvalue(), 24, key="k").rgb) == {0, 0x80}
    white = decode_image(buffer.getvalue(), 24, key="k", options=ImageOptions(transparency="white"))
    assert set(white.rgb[:100]) == {255} and set(white.rgb[-100:]) == {0x80}


def png_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in chunks)  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_damaged_chunks_of_every_kind_are_an_error_of_their_sample_or_ignored(noise: np.ndarray) -> None:
    header = (b"IHDR", struct.pack(">IIBBBBB", 40, 30, 8, 2, 0, 0, 0))
    rows = b"".join(b"\0" + row.tobytes() for row in noise.transpose(1, 0, 2))
    body = [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    exact = decode_image(png_chunks(header, *body), 24, key="k")
    contents = [b"", b"a", b"a\0b", bytes(3), b"\xff" * 40, b"key\0\0" + zlib.compress(b"x"), bytes(800)]
    kinds = [
        "tRNS",
        "gAMA",
        "cHRM",
        "sRGB",
        "iCCP",
        "pHYs",
        "tEXt",
        "zTXt",
        "iTXt",
        "eXIf",
        "acTL",
        "fcTL",
        "fdAT",
        "PLTE",
        "bKGD",
        "tIME",
        "sBIT",
        "IHDR",
        "IDAT",
        "priv",
    ]
    outcomes = set()
    for kind in kinds:
        for content in contents:
            data = png_chunks(header, (kind.encode(), content), *body)
            for options in (ImageOptions(), ImageOptions("white", exif_rotation=True)):
                try:
                    outcomes.add(decode_image(data, 24, key="a/1", options=options).rgb == exact.rgb)
                except UnreadableImage as error:
                    assert str(error).startswith("image of sample a/1 is not a readable image"), (kind, content)
                    outcomes.add(None)
    assert {True, None} <= outcomes
    for broken in ((body[0], body[1]), (header, body[1]), (header, (b"IDAT", b"x"), body[1]), (header,), ()):
        with pytest.raises(UnreadableImage, match="of sample a/1 is not a readable image.* PNG image"):
            decode_image(png_chunks(*broken), 24, key="a/1")


def test_every_format_cut_off_anywhere_is_named_or_whole(noise: np.ndarray) -> None:
    for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"):
        data = encoded(noise, form)
        for end in (0, 1, 2, 4, 8, 16, 30, len(data) // 3, len(data) // 2, len(data) - 60):
            with pytest.raises(UnreadableImage, match=r"^image of sample a/1 .*") as raised:
                decode_image(data[:end], 24, key="a/1")
            assert "0x" not in str(raised.value) and "\n" not in str(raised.value)
        assert decode_image(data + b"trailing", 24, key="a/1").rgb == decode_image(data, 24, key="a/1").rgb


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_several_frames_the_first_is_read(noise: np.ndarray, form: str) -> None:
    buffer, first = io.BytesIO(), Image.fromarray(noise)
    others = [Image.fromarray(255 - noise), Image.new("RGB", first.size)]
    first.save(buffer, format=form, save_all=True, append_images=others)
    moving, still = decode_image(buffer.getvalue(), 24, key="k"), decode_image(encoded(noise, form), 24, key="k")
    one, other = (np.frombuffer(image.rgb, np.uint8).astype(int) for image in (moving, still))
    assert np.abs(one - other).mean() < 12


def test_a_file_that_does_not_fit_into_memory_is_an_error_of_its_sample(tmp_path: Path, monkeypatch) -> None:
    def fail(self: Path) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UnreadableImage, match=r"^image .*a.jpg of sample k cannot be read: it does not fit"):
        decode_image(tmp_path / "a.jpg", 24, key="k")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_grey_of_32_bits_is_refused(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (24, 24), 300).save(buffer, format="TIFF")
    with pytest.raises(UnreadableImage, match="image of sample k has grey of 32 bits or .* convert it to 8 or 16 bits"):
        decode_image(buffer.getvalue(), 24, key="k")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_ignored_as_in_the_released_code_or_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 24, 12))
    buffer, options = io.BytesIO(), {}
    if mode == "RGB":
        options = {"transparency": (0, 0, 0)}
    elif mode == "P":
        image = image.quantize(8)
        options = {"transparency": image.getpixel((0, 23))}
    (image if mode == "P" else image.convert(mode)).save(buffer, format="PNG", **options)
    official = decode_image(buffer.getvalue(), 24, key="k")
    assert set(official.rgb) == {0}
    white = decode_image(buffer.getvalue(), 24, key="k", options=ImageOptions(transparency="white"))
    half = len(white.rgb) // 2
    assert set(white.rgb[half:]) == {255} and set(white.rgb[:half]) == ({255} if mode == "RGB" else {0})
    assert white.checksum != official.checksum  # the audit log tells them apart


def test_opaque_images_do_not_depend_on_the_options(noise: np.ndarray) -> None:
    options = ImageOptions(transparency="white", exif_rotation=True)
    for form, mode in (("PNG", "RGB"), ("JPEG", "L"), ("GIF", "P"), ("PNG", "RGBA")):
        data = encoded(noise, form, mode)
        assert decode_image(data, 24, key="k", options=options) == decode_image(data, 24, key="k")


def test_exif_rotation_is_an_option(noise: np.ndarray) -> None:
    upright, exif, buffer = Image.fromarray(noise[:24, :24]), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.save(buffer, format="PNG", exif=exif)
    assert decode_image(buffer.getvalue(), 24, key="k").rgb == upright.tobytes()
    turned = decode_image(buffer.getvalue(), 24, key="k", options=ImageOptions(exif_rotation=True))
    assert turned.rgb == upright.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_images_of_one_key_are_never_mixed_up() -> None:
    cache = ImageCache(24)
    red, blue = image_bytes(200), image_bytes(9)
    found = [cache.decode(data, key="twice") for data in (red, blue, red)]
    assert found == [decode_image(data, 24, key="twice") for data in (red, blue, red)] and found[0] is found[2]
