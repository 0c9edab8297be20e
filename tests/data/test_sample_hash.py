"""The hash of the sample audit log: of what is trained, and of nothing else."""

from dataclasses import replace

import pytest
from data_files import image_bytes

from aki_megatron.data.image import ImageCache, augment, decode_image
from aki_megatron.data.sample_hash import sample_hash
from aki_megatron.types import IGNORE, DecodedImage, Sample, image_items

IMAGE = DecodedImage(bytes(768), 16, checksum=17)
SAMPLE = Sample("vqav2/count/1", [5, 9, 9, 7], [1, 3, 3, 2], [IGNORE, IGNORE, 7, 2], image_items(IMAGE))

OTHERS = {
    "token_id": replace(SAMPLE, token_ids=[5, 9, 9, 8]),
    "order of tokens": replace(SAMPLE, token_ids=[9, 5, 9, 7]),
    "modality": replace(SAMPLE, modality_ids=[2, 3, 3, 2]),
    "target": replace(SAMPLE, targets=[IGNORE, IGNORE, 7, 3]),
    "supervision": replace(SAMPLE, targets=[IGNORE, IGNORE, IGNORE, 2]),
    "length": replace(SAMPLE, token_ids=[5, 9, 9], modality_ids=[1, 3, 3], targets=[IGNORE, IGNORE, 7]),
    "no image": replace(SAMPLE, media=()),
    "image": replace(SAMPLE, media=image_items(DecodedImage(IMAGE.rgb, 16, checksum=18))),
    "second image": replace(SAMPLE, media=SAMPLE.media * 2),
    "size": replace(SAMPLE, media=image_items(DecodedImage(IMAGE.rgb, 8, checksum=17))),
}


@pytest.mark.parametrize("what", OTHERS)
def test_everything_that_is_trained_changes_the_hash(what: str) -> None:
    assert sample_hash(0, 0, OTHERS[what]) != sample_hash(0, 0, SAMPLE)


def test_the_hash_is_of_content_and_place_not_of_the_name() -> None:
    assert sample_hash(3, 1, replace(SAMPLE, key="moved/1")) == sample_hash(3, 1, SAMPLE)
    assert len({sample_hash(sequence, index, SAMPLE) for sequence in range(12) for index in range(12)}) == 144


def test_hashes_stay_those_of_their_version() -> None:
    assert sample_hash(3, 1, SAMPLE) == 4958392538086215183
    assert sample_hash(3, 1, replace(SAMPLE, media=())) == 14471869835929611579


def test_every_image_has_its_checksum() -> None:
    """The same pixels from another file are another image, and a crop of it is another still."""
    encoded = [image_bytes(3), image_bytes(4), image_bytes(3, form="PNG")]
    images = [decode_image(data, 8, key="a") for data in encoded]
    images += [augment(images[0], seed) for seed in (1, 2)]
    assert len({image.checksum for image in images}) == 5
    assert decode_image(encoded[0], 8, key="b").checksum == images[0].checksum
    cache = ImageCache(8)
    for image, data in zip(images[:3] * 2, encoded * 2, strict=True):
        assert cache.decode(data, key=str(image.checksum)).checksum == image.checksum
    assert cache.decode(encoded[0], key="c", augment_seed=1).checksum == images[3].checksum
