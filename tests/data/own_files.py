"""Conversations of one's own in the three formats, for the tests of data/sources/own.py."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
from data_files import image_bytes
from pyarrow import parquet

from aki_megatron.config.data import SourceConfig
from aki_megatron.data.sources.own import OwnSource, open_own

NUM_PICTURES = 6


def write_pictures(root: Path, folder: str = "pics") -> Path:
    """Write 0.png ... 5.png of different shades."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(NUM_PICTURES):
        (root / folder / f"{number}.png").write_bytes(image_bytes(40 * number, form="PNG"))
    return root / folder


def llava(*texts: str, image: Any = None, **other: Any) -> dict[str, Any]:
    """Return a record whose texts are of the user and the assistant in turn."""
    speakers = ("human", "gpt")
    messages = [{"from": speakers[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"conversations": messages, **({} if image is None else {"image": image}), **other}


def chat(*contents: Any, system: Any = None, **other: Any) -> dict[str, Any]:
    """Return a record of OpenAI's messages."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    messages += [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return {"messages": messages, **other}


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """Write a record a line; text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], *, row_group_size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def picture_row(number: int, **other: Any) -> dict[str, Any]:
    """Return a row as Hugging Face datasets store it: messages of parts, and the image beside them."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": f"Number {number}?"}]
    answer = [{"type": "text", "text": f"It is {number}."}]
    image = {"bytes": image_bytes(number, form="PNG"), "path": f"http://x.invalid/{number}.png"}
    return chat(parts, answer, images=[image], id=f"r{number}", **other)


def config(format_: str, path: Any, **other: Any) -> SourceConfig:
    values: Mapping[str, Any] = {"name": "mine", "format": format_, "path": path, "images": "pics", **other}
    return SourceConfig.model_validate(values)


def opened(root: Path, format_: str, path: Any, **other: Any) -> OwnSource:
    return open_own(root, config(format_, path, **other))
