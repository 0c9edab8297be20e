"""Checks of the entries of data.sources: the datasets of the registry, and files of one's own."""

import re
from collections.abc import Iterator

from aki_megatron.config.data import ColumnsConfig, SourceConfig
from aki_megatron.config.datasets import DATASET_FORMAT, DATASETS, DRAWN_DATASETS, OWN_FORMATS
from aki_megatron.config.field_info import format_value
from aki_megatron.config.run import RunConfig

OWN_NAME = re.compile(r"[\w.+-]+")
"""Names of own sources: they are parts of keys, which are divided by slashes."""

MULTI_TURN = "llava150k"
"""The dataset that has conversations of several turns."""


def source_problems(run: RunConfig) -> Iterator[str]:
    """Check that every source is a dataset of the registry, or names its own files and nothing of a dataset."""
    for section, sources in (("data", run.data.sources), ("validation", run.validation.sources)):
        for number, source in enumerate(sources):
            key = f"{section}.sources[{number}]"
            if source.format == DATASET_FORMAT:
                yield from _dataset_problems(key, source)
            else:
                yield from _own_problems(key, source)


def _dataset_problems(key: str, source: SourceConfig) -> Iterator[str]:
    given = [name for name in ("path", "images", "columns") if getattr(source, name) not in ((), "", ColumnsConfig())]
    if source.name not in (*DATASETS, *DRAWN_DATASETS):
        if given:
            yield (
                f"{key} {source.name} is no public dataset but gives {' and '.join(given)}; add the format of its "
                f"files: one of {', '.join(OWN_FORMATS)}."
            )
        else:
            yield (
                f"{key}.name must be one of {', '.join(DATASETS)}; got {format_value(source.name)}. For files of your "
                f"own give a format ({', '.join(OWN_FORMATS)}) and a path: {{name: mine, format: llava, path: "
                "chat.jsonl}."
            )
        return
    if given:
        yield (
            f"{key} {source.name}: {' and '.join(given)} are for files of your own (format {', '.join(OWN_FORMATS)}); "
            "the files of a dataset are where its release has them below data.root. Remove them."
        )
    if not source.split_turns and source.name != MULTI_TURN:
        yield (
            f"{key} {source.name}: split_turns=false is for {MULTI_TURN}, the dataset that has conversations, "
            "and for files of your own; remove it."
        )


def _own_problems(key: str, source: SourceConfig) -> Iterator[str]:
    if source.name in (*DATASETS, *DRAWN_DATASETS):
        yield (
            f"{key}.name={source.name} is the name of a public dataset, but format={source.format} is for files of "
            "your own; choose another name, or remove the format."
        )
    elif not OWN_NAME.fullmatch(source.name):
        yield (
            f"{key}.name must hold letters, digits and . _ + - only, for it is a part of sample keys; got "
            f"{format_value(source.name)}."
        )
    if not source.path or any(not path.strip() for path in source.path):
        yield f"{key} {source.name}: format={source.format} needs path, its files below data.root: path: chat.jsonl."
    for path in (*source.path, source.images):
        if "://" in path or path.startswith("pipe:"):
            yield (
                f"{key} {source.name}: {format_value(path)} is no path; own files are read from disk: download them "
                "first."
            )
