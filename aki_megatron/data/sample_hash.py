"""Hash what a sample trains, for the sample audit log: token ids, modality ids, targets and its media, not its name.

A step's hash is the sum of its samples' hashes modulo 2^64, so it does not depend on how they are dealt to ranks.
"""

from array import array
from hashlib import blake2b

from aki_megatron.types import DecodedAudio, DecodedImage, MediaItem, Sample

HASH_VERSION = 2
"""Of sample_hash. Version 1, of earlier releases, was of the samples' keys only; two versions cannot be compared."""


def sample_hash(sequence: int, index: int, sample: Sample) -> int:
    """Return a 64-bit hash of a sample's content, its sequence in the step and its index in the sequence.

    Its media are decoded, as streams return them. The checksum of an encoded file stands for the pixels or the sound:
    hashing those would take 3 % of the loader's time.
    """
    digest = blake2b(f"{sequence} {index} {len(sample.token_ids)} ".encode(), digest_size=8)
    digest.update(array("i", sample.token_ids).tobytes())
    digest.update(bytes(sample.modality_ids))
    digest.update(array("i", sample.targets).tobytes())
    digest.update(" ".join(_describe(item, sample.key) for item in sample.media).encode())
    return int.from_bytes(digest.digest(), "little")


def _describe(item: MediaItem, key: str) -> str:
    """Return what of a decoded item is hashed. The text for images must not change: hashes of old runs depend on it."""
    content = item.content
    if isinstance(content, DecodedAudio):
        return f"audio {content.num_mel_bins} {content.num_frames} {content.checksum}"
    assert isinstance(content, DecodedImage), key
    return f"{content.size} {content.checksum}"
