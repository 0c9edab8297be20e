"""LLaVA-Instruct-150K: conversations about COCO images. https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K

The release has no split: every conversation is in ``train``, and there is no ``val``.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.sources.json_stream import JsonLocation, iter_array
from aki_megatron.data.sources.records import (
    MAX_SHOWN,
    DatasetReader,
    LazyConversations,
    PackedRecords,
    as_list,
    as_text,
    parse_entries,
    safe_path,
    text_field,
)
from aki_megatron.types import Conversation, Turn, image_items

FILES = {"train": ("llava/llava_instruct_150k.json", "A-OKVQA/train2017")}

PLACEHOLDERS = ("<image>\n", "\n<image>", "<image>")
"""How the image is written in a human turn; it is removed, and the template puts the image where it belongs."""


class _Dialogue(NamedTuple):
    name: str
    image: str
    turns: list[list[str]]


def read(root: Path, split: str, *, multi_turn: bool = False) -> LazyConversations[_Dialogue]:
    """Read each pair of a human and a gpt turn as a sample of its own, without history (as in the papers).

    ``multi_turn`` keeps a conversation as one sample of several turns. One whose turns do not alternate is left out.
    Ids repeat in the release, so a key holds the conversation's number too.
    """
    file, folder = (root / name for name in FILES[split])
    faults = FaultCounts()
    dialogues = parse_entries(file, iter_array(file), partial(_parse, multi_turn), faults, id_field="id")
    return LazyConversations(PackedRecords(dialogues, _Dialogue._make), partial(_conversation, folder), faults)


def _conversation(folder: Path, dialogue: _Dialogue) -> Conversation:
    key = f"llava150k/dialogue/{dialogue.name}"
    turns = tuple(Turn(prompt, response) for prompt, response in dialogue.turns)
    return Conversation(key, turns, image_items(safe_path(folder, dialogue.image, key=key)))


def _parse(multi_turn: bool, location: JsonLocation, entry: Any) -> Iterator[_Dialogue]:
    messages = as_list(entry["conversations"], "conversations")
    speakers = [message["from"] for message in messages]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError(f"the turns do not alternate between human and gpt: they are {str(speakers[:8])[:MAX_SHOWN]}")
    name = f"{as_text(entry.get('id') or '', 'id').replace('/', '_')}.{location.number}"
    image = text_field(entry, "image")
    texts = [text_field(message, "value") for message in messages]
    turns = [[_remove_placeholder(human), gpt] for human, gpt in zip(texts[::2], texts[1::2], strict=True)]
    if multi_turn:
        yield _Dialogue(name, image, turns)
    else:
        yield from (_Dialogue(f"{name}.{number}", image, [turn]) for number, turn in enumerate(turns))


def _remove_placeholder(human: str) -> str:
    for placeholder in PLACEHOLDERS:
        human = human.replace(placeholder, "")
    return human


READER = DatasetReader(FILES, read, partial(read, multi_turn=True))
