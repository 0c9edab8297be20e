"""How many records and images the public releases have, to compare a copy with."""

from typing import NamedTuple


class ReleaseCount(NamedTuple):
    """Records as the reader counts them, and the images that they use; None where the release does not say."""

    records: int | None
    images: int | None = None


RELEASE_COUNTS: dict[str, dict[str, ReleaseCount]] = {
    "vqav2": {"train": ReleaseCount(443_757, 82_783), "val": ReleaseCount(214_354, 40_504)},
    "gqa": {"train": ReleaseCount(943_000, 72_140), "val": ReleaseCount(132_062, 10_234)},
    "vsr": {"train": ReleaseCount(7_680), "val": ReleaseCount(1_097)},
    "aokvqa": {"train": ReleaseCount(17_056), "val": ReleaseCount(1_145)},
    "scienceqa": {"train": ReleaseCount(12_726, 6_218), "val": ReleaseCount(4_241, 2_097)},
    "refcoco": {"train": ReleaseCount(120_624, 16_994), "val": ReleaseCount(10_834, 1_500)},
    "refcoco+": {"train": ReleaseCount(120_191, 16_992), "val": ReleaseCount(10_758, 1_500)},
    "refcocog": {"train": ReleaseCount(80_512, 21_899), "val": ReleaseCount(4_896, 1_300)},
    "visualgenome": {"train": ReleaseCount(5_408_689, 108_077)},
}
"""Dataset -> split -> counts of the release.

OCR-VQA has 1,002,146 questions about 207,572 covers in all its splits together, and LLaVA-Instruct-150K 157,712
conversations; what the reader makes of them (questions of one split, turns) is not published. RefCOCO, RefCOCO+ and
RefCOCOg as in MDETR's files: one record per phrase, the splits unc, unc and umd.
"""


def release_count(name: str, split: str) -> ReleaseCount:
    """Return the counts of a dataset's release, without numbers where they are not known."""
    return RELEASE_COUNTS.get(name, {}).get(split, ReleaseCount(None))
