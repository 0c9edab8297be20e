"""LLaVA-Instruct-150K: dialogues about COCO pictures. https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K

The release has no split: every dialogue is in ``train``, and there is no ``val``.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.json_stream import Place, array
from aki_megatron.data.sources.records import PackedRows, Rows, inside, rows_of, text_of
from aki_megatron.types import Conversation, Turn

FILES = {"train": ("llava/llava_instruct_150k.json", "A-OKVQA/train2017")}

PLACEHOLDERS = ("<image>\n", "\n<image>", "<image>")
"""How a picture is written in a human turn; it is taken out, and the template puts the picture where it belongs."""


class _Row(NamedTuple):
    name: str
    image: str
    turns: list[list[str]]


def read(root: Path, split: str, *, whole: bool = False) -> Sequence[Conversation]:
    """Each pair of a human and a gpt turn as a sample of its own, without history (the papers' way).

    ``whole`` keeps a dialogue together as one sample of several turns. Turns that do not alternate raise a
    DataError that names the dialogue's id. Ids repeat in the release, so a key holds the dialogue's number too.
    """
    file, folder = (root / name for name in FILES[split])
    rows = rows_of(file, array(file), partial(_rows, whole), id_field="id")
    return Rows(PackedRows(rows, _Row._make), partial(_conversation, folder))


def _conversation(folder: Path, row: _Row) -> Conversation:
    key = f"llava150k/dialogue/{row.name}"
    turns = tuple(Turn(prompt, response) for prompt, response in row.turns)
    return Conversation(key, turns, inside(folder, row.image, key=key))


def _rows(whole: bool, place: Place, record: Any) -> Iterator[_Row]:
    said = record["conversations"]
    speakers = [turn["from"] for turn in said]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError(
            f"the turns of id {record.get('id')} do not alternate between human and gpt: they are {speakers[:8]}"
        )
    name = f"{str(record.get('id', '')).replace('/', '_')}.{place.number}"
    image = text_of(record, "image")
    values = [text_of(turn, "value") for turn in said]
    pairs = [[_without_picture(human), gpt] for human, gpt in zip(values[::2], values[1::2], strict=True)]
    if whole:
        yield _Row(name, image, pairs)
    else:
        yield from (_Row(f"{name}.{number}", image, [pair]) for number, pair in enumerate(pairs))


def _without_picture(human: str) -> str:
    for placeholder in PLACEHOLDERS:
        human = human.replace(placeholder, "")
    return human
