"""500 mutated records: whatever is in an annotation file, a fault is named and counted, and no run ends."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_files import write_sources
from source_files import write_more_sources

from aki_megatron.config.datasets import DATASETS
from aki_megatron.data.image import decode_image
from aki_megatron.data.sources import dataset_reader, open_sources
from aki_megatron.data.template import Template
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation

NUM_MUTATIONS = 500
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**30, 1.5, float("nan"), float("inf"), "", " ", "12", "\ud83d", "\udc00 and more",
    "\ufeffmarked", "\u2028", "a\x00b", "../../etc/passwd", "/etc/passwd", "x" * 400, "<image>", "</s>", [], {}, [[]],
    [None], {"a": 1}, [1, 2, 3], ["a", "b"], "\u202eright to left", "1e999", [{"from": "human", "value": "x"}],
)  # fmt: skip


def json_files(name: str) -> list[str]:
    return [file for file in dataset_reader(name).files["train"] if file.endswith((".json", ".jsonl"))]


def load(path: Path) -> Any:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def save(path: Path, content: Any) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in content))
    else:
        path.write_text(json.dumps(content))


def records(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, index) of every record of an annotation file."""
    if isinstance(content, list):
        yield from ((content, index) for index in range(len(content)))
        return
    for name, value in content.items():
        if name in ("questions", "annotations", "images") and isinstance(value, list):
            yield from ((value, index) for index in range(len(value)))
        elif isinstance(value, dict):
            yield content, name


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, index) of everything inside a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for index, inner in list(items):
        yield value, index
        yield from places(inner)


def mutate(rng: random.Random, content: Any) -> bool:
    """Change one record, or what is in it, in place; return whether all samples must still be there, or be faults.

    A record that is not in the file, or is of another split, is no fault.
    """
    container, index = rng.choice(list(records(content)))
    inside = list(places(container[index]))
    if inside and rng.random() < 0.9:
        container, index = rng.choice(inside)
    kind = rng.choice(("replace", "replace", "delete", "repeat"))
    if kind == "delete":
        del container[index]
        return isinstance(container, dict) and container is not content
    if kind == "repeat" and isinstance(container, list):
        container.insert(index, copy.deepcopy(container[index]))
    else:
        container[index] = copy.deepcopy(rng.choice(VALUES))
        return index != "split" and container[index] != []
    return True


def read_all(root: Path, name: str, template: Template) -> tuple[dict[str, Conversation], list[str]]:
    """Return the samples that can be trained on, and what was said about the others."""
    opened = open_sources(root, [name], "train", max_bad_fraction=1.0)[name]
    good, messages = {}, [line for line in opened.faults.lines(1000)]
    for index in range(len(opened)):
        try:
            conversation = opened[index]
            template.render_conversation(conversation)
            if conversation.images:
                decode_image(conversation.images[0], 8, key=conversation.key)
        except DataError as error:
            messages.append(str(error))
        else:
            good[conversation.key] = conversation
    return good, messages


@pytest.mark.parametrize(("number", "name"), enumerate(DATASETS))
def test_mutated_records_are_named_and_counted(
    number: int, name: str, tmp_path: Path, make_session_template: Template
) -> None:
    write_sources(tmp_path, count=3)
    write_more_sources(tmp_path)
    rng = random.Random(number)
    expected, _ = read_all(tmp_path, name, make_session_template)
    num_faults = 0
    for _ in range(-(-NUM_MUTATIONS // len(DATASETS))):
        path = tmp_path / rng.choice(json_files(name))
        good = load(path)
        content = copy.deepcopy(good)
        complete = mutate(rng, content)
        save(path, content)
        try:
            found, messages = read_all(tmp_path, name, make_session_template)
        except DataError as error:  # of the source as a whole: arrays of two lengths, or no sample left
            found, messages = {}, [str(error)]
        assert messages or not complete or len(found) >= len(expected), content
        assert all(message.encode() for message in messages), messages
        assert all(len(message) < 2000 for message in messages)
        num_faults += bool(messages)
        save(path, good)
    print(f"{name}: {num_faults} mutations with faults, each named")
    assert num_faults > 5
