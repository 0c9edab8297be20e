"""The samples of a tar as this package reads them and as webdataset does."""

from pathlib import Path

from webdataset import WebDataset, ignore_and_continue

from aki_megatron.data.shards import CaptionDataset
from aki_megatron.data.tar_scan import IMAGE_SUFFIXES
from aki_megatron.errors import DataError

Samples = list[tuple[str, str, bytes]]


def read_samples(tar: Path) -> tuple[Samples, list[str]]:
    """Return the readable samples of a tar, and the errors of the others."""
    try:
        dataset = CaptionDataset([tar.name], tar.parent)
    except DataError as error:
        return [], [str(error)]
    samples, errors = [], []
    for index in range(len(dataset)):
        try:
            caption = dataset.caption(index)
            samples.append((caption.key.removeprefix(f"{tar.stem}/"), caption.text, caption.image))
        except DataError as error:
            errors.append(str(error))
    return samples, errors


def read_with_webdataset(tar: Path) -> Samples:
    """Return the samples of a tar with text and image, as webdataset reads them.

    Not with its warn_and_continue: that waits half a second at every error.
    """
    found = []
    for sample in WebDataset(str(tar), shardshuffle=False, handler=ignore_and_continue, empty_check=False):
        image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        if image is not None and "txt" in sample:
            found.append((sample["__key__"], sample["txt"].decode(), image))
    return found
