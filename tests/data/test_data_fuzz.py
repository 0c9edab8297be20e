"""Mutated tars and images, drawn from a seed: every fault is named and counted, and no run ends."""

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

from data_files import IMAGE_DECODERS, pairs, write_tar
from PIL import Image
from tar_readers import read_samples, read_with_webdataset

from aki_megatron.data.mixture import Mixture
from aki_megatron.data.sample_stream import MixtureStream, Source
from aki_megatron.data.shards import CaptionDataset


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with some changed, a stretch removed, doubled or zeroed, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(0, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    start = rng.randrange(len(changed))
    stretch = slice(start, start + rng.choice((1, 7, 512, 1024, 5000)))
    match rng.randrange(6):
        case 0:
            del changed[stretch]
        case 1:
            changed[stretch] = changed[stretch] * 2
        case 2:
            changed[stretch] = bytes(len(changed[stretch]))
        case 3:
            del changed[start:]
        case 4:
            changed += data[start:]
    return bytes(changed)


def stream_of(dataset: CaptionDataset, render: Callable) -> MixtureStream:
    source = Source(dataset, read_text=lambda n: dataset.caption(n, with_image=False), locate=dataset.location)
    return MixtureStream({"fuzz": source}, Mixture({"fuzz": 1.0}, seed=0), render, decoders=IMAGE_DECODERS)


def test_200_mutated_tars_never_end_a_run_and_every_fault_is_named(tmp_path: Path, make_template) -> None:
    rng, render, num_faults = random.Random(14), make_template().render_caption, 0
    write_tar(tmp_path / "good.tar", pairs(2, first=900))
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    original = dict(pairs(8))
    for number in range(200):
        with tarfile.open(tmp_path / "source.tar", "w", format=forms[number % 3]) as tar:
            for name, data in original.items():
                member = tarfile.TarInfo(name if number % 3 else f"{'long' * 30}/{name}")
                member.size, member.mtime = len(data), number + 0.5
                tar.addfile(member, io.BytesIO(data))
        (tmp_path / f"{number}.tar").write_bytes(mutated((tmp_path / "source.tar").read_bytes(), rng))
        lines: list[str] = []
        dataset = CaptionDataset(["good.tar", f"{number}.tar"], tmp_path, progress=lines.append)
        samples, errors = read_samples(tmp_path / f"{number}.tar")
        assert all(f"{tmp_path}/{number}.tar" in error for error in errors)
        num_faults += len(errors)
        refused = any("several times in a row" in error for error in errors)
        assert refused or samples == read_with_webdataset(tmp_path / f"{number}.tar")
        stream = stream_of(dataset, render)
        for n in range(12):
            loaded = stream.sample(n)
            assert loaded.sample is not None
            assert all(bad.reason.startswith(f"Tar {tmp_path}") for bad in loaded.bad_samples)
            stream.length(n)
        if errors:
            named = [line for line in lines if line.strip().startswith(f"{tmp_path}/{number}.tar: ")]
            counts = f" of {len(dataset) - 2} samples readable", f" of at least {len(dataset) - 2} samples readable"
            assert named and any(text in named[0] for text in (*counts, "no sample readable"))
    print(f"200 mutated tars: {num_faults} unreadable samples, each named")
    assert num_faults > 300


def drawn_images() -> list[bytes]:
    """Return small images of every format and mode that is read."""
    rng = random.Random(3)
    noise = Image.frombytes("RGB", (20, 17), rng.randbytes(20 * 17 * 3)).resize((40, 34))
    kinds = [("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    kinds += [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("GIF", "P"), ("WEBP", "RGB"), ("WEBP", "RGBA")]
    kinds += [("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "I;16"), ("PPM", "RGB"), ("JPEG2000", "RGB"), ("MPO", "RGB")]
    images = []
    for form, mode in kinds:
        buffer, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6
        image = noise.convert("L").convert("I").convert(mode) if mode == "I;16" else noise.convert(mode)
        options = {"exif": exif} if form in ("PNG", "JPEG", "WEBP") else {}
        image.save(buffer, format=form, **options)
        images.append(buffer.getvalue())
    return images


def test_2000_mutated_images_never_end_a_run_and_every_fault_is_named(tmp_path: Path, make_template) -> None:
    rng, images = random.Random(41), drawn_images()
    members = [*pairs(2, first=9000)]
    for number in range(2000):
        data = mutated(images[number % len(images)], rng)
        members += [(f"{number:05}.jpg", data), (f"{number:05}.txt", f"image {number}".encode())]
    write_tar(tmp_path / "fuzz.tar", members)
    dataset = CaptionDataset(["fuzz.tar"], tmp_path)
    assert len(dataset) == 2002 and dataset.counts.tolist() == [2002]
    stream = stream_of(dataset, make_template().render_caption)
    num_bad = num_good = 0
    for n in range(2002):
        loaded = stream.sample(n, replace_images=False)
        num_good += loaded.sample is not None
        num_bad += len(loaded.bad_samples)
        for bad in loaded.bad_samples:
            assert bad.source == "fuzz" and bad.reason.startswith(f"Tar {tmp_path}/fuzz.tar, key 0")
            assert "image of sample fuzz/" in bad.reason and "0x" not in bad.reason
    print(f"2,000 mutated images and 2 good ones: {num_good} trained, {num_bad} named and counted")
    assert num_good + num_bad == 2002 and num_bad > 500 and num_good > 300
