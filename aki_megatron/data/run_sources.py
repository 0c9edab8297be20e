"""The conversation sources of a run, public datasets and files of one's own: missing files, opening, fingerprints."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from aki_megatron.config.data import DataConfig, SourceConfig
from aki_megatron.config.datasets import DATASET_FORMAT
from aki_megatron.data.fingerprint import ALL_IMAGE_SUFFIXES, FileFingerprints, Fingerprint
from aki_megatron.data.sample_stream import Source
from aki_megatron.data.sources import dataset_reader, missing_error, missing_files, open_sources, report_faults
from aki_megatron.data.sources.own import images_folder, missing_own_files, open_own, source_files
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation

SPLIT = "train"
"""Split of the datasets that a run reads."""


def missing_source_files(config: DataConfig, split: str = SPLIT) -> list[str]:
    """Return every file or folder that the sources of a run need and that does not exist, with the source.

    split  of the public datasets; files of one's own have none
    """
    datasets, own = _by_kind(config.sources)
    missing = missing_files(config.root, [source.name for source in datasets], split)
    return missing + [line for source in own for line in missing_own_files(config.root, source)]


def open_conversations(
    config: DataConfig, progress: Callable[[str], None], split: str = SPLIT
) -> dict[str, Source[Conversation]]:
    """Open every source of a run by name; ``progress`` gets lines that say which records are left out.

    split  as of missing_source_files

    Raises DataError for what is missing or cannot be read, and where too many records are bad.
    """
    if missing := missing_source_files(config, split):
        raise missing_error(config.root, missing, split)
    datasets, own = _by_kind(config.sources)
    opened = open_sources(
        config.root,
        [source.name for source in datasets],
        split,
        multi_turn=[source.name for source in datasets if not source.split_turns],
        max_bad_fraction=config.max_bad_fraction,
        progress=progress,
    )
    found = {
        source.name: Source(
            opened[source.name],
            locate=partial(
                _locate_conversation, _annotation_files(config.root, source.name, split), opened[source.name]
            ),
            augment=source.augment == "official",
        )
        for source in datasets
    }
    for source in own:
        files = open_own(config.root, source)
        report_faults(source.name, files.items, config.max_bad_fraction, progress)
        if not files.items:
            listing = "".join(f"\n  {line}" for line in files.items.faults.lines())
            raise DataError(f"The source {source.name} has no sample in {', '.join(source.path)}.{listing}")
        found[source.name] = Source(
            files.items,
            read_text=files.read_text,
            locate=files.locate,
            augment=source.augment == "official",
            counts=files.counts,
        )
    return {source.name: found[source.name] for source in config.sources}


def source_fingerprints(config: DataConfig, num_records: Mapping[str, int]) -> dict[str, Fingerprint]:
    """Return the fingerprint of every source by name; ``num_records`` is the number of samples of each.

    Raises DataError where a file cannot be read.
    """
    shared = FileFingerprints(config.root)
    found = {}
    for source in config.sources:
        if source.format == DATASET_FORMAT:
            names = dataset_reader(source.name).files_below(config.root, SPLIT)
            found[source.name] = shared.fingerprint(names, num_records[source.name])
        else:
            files = source_files(config.root, source)
            # bytes of images are in the tables themselves; paths in them start at a folder that is named
            folder = None if source.format == "parquet" and not source.images else images_folder(config.root, source)
            found[source.name] = shared.numbered_fingerprint(
                files, folder, num_records[source.name], ALL_IMAGE_SUFFIXES
            )
    return found


def _by_kind(sources: Sequence[SourceConfig]) -> tuple[list[SourceConfig], list[SourceConfig]]:
    """Return the public datasets, and the sources of one's own files."""
    datasets = [source for source in sources if source.format == DATASET_FORMAT]
    return datasets, [source for source in sources if source.format != DATASET_FORMAT]


def _annotation_files(root: Path, name: str, split: str) -> str:
    """Return the annotation files of a dataset, as messages name them."""
    files = dataset_reader(name).files_below(root, split)
    return " and ".join(str(root / file) for file in files if Path(file).suffix)


def _locate_conversation(files: str, items: Sequence[Conversation], index: int) -> str:
    """Return how messages name a conversation of a dataset: by its files and key; by its number without a key."""
    sample = f"number {index}"
    with suppress(Exception):  # reading it may be what failed
        sample = items[index].key
    return f"{files}, sample {sample}"
