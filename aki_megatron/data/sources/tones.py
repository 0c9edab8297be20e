"""Questions about drawn recordings of tones, some with an image (tools/make_data.py tones): LLaVA's JSON with audio.

An entry is ``{"id": "count/7", "audio": "recordings/train/7.wav", "image": "images/train/7.png", "conversations":
[...]}`` below ``tones/``; ``<audio>`` and ``<image>`` in a human turn say where the recording and the image stand. Each
field may be left out or be a list, used in order. The part of the id before the slash is the task.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.sources.json_stream import JsonLocation, iter_array
from aki_megatron.data.sources.records import (
    DatasetReader,
    LazyConversations,
    PackedRecords,
    as_text,
    parse_entries,
    safe_path,
    text_field,
)
from aki_megatron.types import Conversation, MediaItem, Modality, Placeholder, Turn

FOLDER = "tones"
FILES = {split: (f"{FOLDER}/tones_{split}.json",) for split in ("train", "val")}

MODALITIES = {"image": Modality.IMAGE, "audio": Modality.AUDIO}
"""Field of an entry, and tag in a prompt -> what it stands for."""

_TAG = re.compile("|".join(f"<{name}>" for name in MODALITIES))


class _Entry(NamedTuple):
    name: str
    files: list[list[str]]
    """For every tag of the prompts in order: its name and the file."""
    turns: list[list[str]]


def read(root: Path, split: str) -> LazyConversations[_Entry]:
    """Read every entry as a sample of one or several turns. One whose tags do not fit its files is left out."""
    file = root / FILES[split][0]
    faults = FaultCounts()
    entries = parse_entries(file, iter_array(file), _parse, faults, id_field="id")
    return LazyConversations(PackedRecords(entries, _Entry._make), partial(_conversation, root / FOLDER), faults)


def _parse(location: JsonLocation, entry: Any) -> Iterator[_Entry]:
    messages = entry["conversations"]
    speakers = [message["from"] for message in messages]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError(f"the turns do not alternate between human and gpt: they are {speakers[:8]}")
    texts = [text_field(message, "value") for message in messages]
    given = {name: _files(entry, name) for name in MODALITIES}
    tags = [tag[1:-1] for text in texts[::2] for tag in _TAG.findall(text)]
    for name, files in given.items():
        if len(files) != tags.count(name):
            raise ValueError(f"the prompts have {tags.count(name)} <{name}>, the field {name} has {len(files)} files")
    left = {name: iter(files) for name, files in given.items()}
    turns = [list(turn) for turn in zip(texts[::2], texts[1::2], strict=True)]
    yield _Entry(text_field(entry, "id"), [[name, next(left[name])] for name in tags], turns)


def _files(entry: Any, name: str) -> list[str]:
    value = entry.get(name, [])
    return [as_text(file, name) for file in (value if isinstance(value, list) else [value])]


def _conversation(folder: Path, entry: _Entry) -> Conversation:
    key = f"tones/{entry.name}"
    media = tuple(MediaItem(MODALITIES[name], safe_path(folder, file, key=key)) for name, file in entry.files)
    return Conversation(key, tuple(_turn(human, gpt) for human, gpt in entry.turns), media)


def _turn(human: str, gpt: str) -> Turn:
    """Return a turn whose tags are placeholders."""
    prompt, placeholders, end = "", [], 0
    for match in _TAG.finditer(human):
        prompt += human[end : match.start()]
        placeholders.append(Placeholder(len(prompt), MODALITIES[match.group()[1:-1]]))
        end = match.end()
    return Turn(prompt + human[end:], gpt, tuple(placeholders))


READER = DatasetReader(FILES, read)
