"""Parse one record of a user's own conversations: who says what, and where images stand.

Three layouts are one record here: LLaVA's (from, value), OpenAI's (role, content, where content is text or a list of
parts), and the pairs {user, assistant} of Hugging Face tables. Prompts are taken as they are: only the placeholder
``<image>`` is taken out of the text, and where it stood is kept as an offset.

``parse_prompt`` reads the messages of a request, which are those of OpenAI's layout and end with a question.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from aki_megatron.data.sources.records import MAX_SHOWN, as_text
from aki_megatron.families.base import IMAGE_TOKEN
from aki_megatron.types import Conversation, MediaItem, Modality, Placeholder, Turn

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
}
"""Role in a record -> what it is."""

IMAGE_PARTS: Mapping[str, Modality] = {"image": Modality.IMAGE, "image_url": Modality.IMAGE}
"""Types of the parts of a message's content that are images."""

AUDIO_PARTS: Mapping[str, Modality] = {"input_audio": Modality.AUDIO}
"""Types of the parts that are recordings; requests have them, records do not."""

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


class RecordLayout(NamedTuple):
    """Names under which a record holds its fields; of several the first that is there counts."""

    messages: tuple[str, ...]
    images: tuple[str, ...] = ("images", "image")
    id: tuple[str, ...] = ("id",)
    role: tuple[str, ...] = ("role",)
    content: tuple[str, ...] = ("content",)


LAYOUTS = {
    "llava": RecordLayout(("conversations",), role=("from",), content=("value",)),
    "messages": RecordLayout(("messages",)),
    "parquet": RecordLayout(
        ("messages", "conversations", "texts"), role=("role", "from"), content=("content", "value")
    ),
}
"""data.sources[].format -> the usual names."""


class ChatTurn(NamedTuple):
    """A question and its answer; ``offsets`` are the characters of the prompt before which images stand."""

    prompt: str
    response: str
    offsets: tuple[int, ...]


class ChatRecord(NamedTuple):
    """A record in plain values. Images are encoded bytes, or text: a path or a data URL."""

    name: str
    system_message: str | None
    turns: tuple[ChatTurn, ...]
    images: tuple[str | bytes, ...]


class ChatPrompt(NamedTuple):
    """The messages of a request; the response of the last turn is empty.

    media  in the order of the placeholders: (modality, what the message says of the item)
    """

    system_message: str | None
    turns: tuple[Turn, ...]
    media: tuple[tuple[Modality, Any], ...]


class _Message(NamedTuple):
    """One message; of its media those that the record holds elsewhere are None, or their number there."""

    role: str
    text: str
    placeholders: tuple[Placeholder, ...]
    media: tuple[Any, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """The characters before which media stand."""
        return tuple(placeholder.offset for placeholder in self.placeholders)


def parse_record(entry: Any, layout: RecordLayout) -> ChatRecord:
    """Return a record with all its images checked, but not read. Raises ValueError for a bad one."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"a record must have keys and values, got {repr(entry)[:MAX_SHOWN]}")
    messages = _messages(_field(entry, layout.messages), layout)
    _check_order(messages)
    system = messages.pop(0).text if messages[0].role == "system" else None
    turns = tuple(
        ChatTurn(user.text, assistant.text, user.offsets)
        for user, assistant in zip(messages[::2], messages[1::2], strict=True)
    )
    images = tuple(image_reference(image) for image in _place_images(messages, _record_images(entry, layout)))
    for number, turn in enumerate(turns):
        if not turn.prompt.strip() and not turn.offsets and (number or not images):
            raise ValueError(f"question {number + 1} is empty: it has neither text nor an image")
        if not turn.response.strip():
            raise ValueError(f"answer {number + 1} is empty")
    return ChatRecord(record_name(entry, layout), system, turns, images)


def parse_prompt(messages: Any, *, with_audio: bool = False) -> ChatPrompt:
    """Return the messages of a request: questions with answers, and last a question.

    with_audio  whether parts may be recordings

    Raises ValueError for anything else.
    """
    layout, part_types = LAYOUTS["messages"], {**IMAGE_PARTS, **(AUDIO_PARTS if with_audio else {})}
    parsed = _messages(messages, layout, part_types)
    _check_order(parsed, ends_with="user")
    system = parsed.pop(0).text if parsed[0].role == "system" else None
    questions, answers = parsed[::2], [*(message.text for message in parsed[1::2]), ""]
    for number, message in enumerate(questions, start=1):
        if not message.text.strip() and not message.media:
            raise ValueError(f"question {number} is empty: it has neither text nor an image")
        if any(item is None or isinstance(item, int) for item in message.media):
            raise ValueError(
                f"question {number} holds {IMAGE_TOKEN} or an image part without an image; give every image as a part "
                'of its own: {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
            )
    turns = tuple(
        Turn(message.text, answer, message.placeholders) for message, answer in zip(questions, answers, strict=True)
    )
    media = tuple(
        (placeholder.modality, item)
        for message in questions
        for placeholder, item in zip(message.placeholders, message.media, strict=True)
    )
    return ChatPrompt(system, turns, media)


def record_name(entry: Mapping[str, Any], layout: RecordLayout) -> str:
    """Return the id of a record, without slashes and spaces, which keys use themselves; empty where it has none."""
    value = _optional(entry, layout.id)
    return "" if value is None else re.sub(r"[\s/]", "_", as_text(value, "id"))


def count_turns(value: Any, layout: RecordLayout) -> int:
    """Return the number of answers in the messages of a record. Raises ValueError as parse_record does."""
    messages = _messages(value, layout)
    _check_order(messages)
    return sum(message.role == "assistant" for message in messages)


def conversation(record: ChatRecord, key: str, roots: Sequence[Path], turn: int | None = None) -> Conversation:
    """Return a record as a sample, or one of its turns without those before it.

    roots  the folder at which paths of images start, and further ones that absolute paths may lead into

    A turn without an image of its own gets those that were shown before it, in front of its prompt. Raises ValueError
    for an image that is refused.
    """
    turns, images = record.turns, record.images
    if turn is not None:
        before = sum(len(earlier.offsets) for earlier in turns[:turn])
        own = len(turns[turn].offsets)
        if any(one.offsets for one in turns):
            images = images[before : before + own] if own else images[:before]
        turns = turns[turn : turn + 1]
    built = tuple(
        Turn(one.prompt, one.response, tuple(Placeholder(at, Modality.IMAGE) for at in one.offsets)) for one in turns
    )
    media = tuple(MediaItem(Modality.IMAGE, image_content(image, roots)) for image in images)
    return Conversation(key, built, media, record.system_message)


def image_reference(image: Any) -> str | bytes:
    """Return what a record says of an image as bytes or text. Raises ValueError for anything else.

    Hugging Face tables hold {bytes, path}, of which the bytes count where they are there.
    """
    if isinstance(image, Mapping):
        found = [image.get(name) for name in ("bytes", "path", "image", "url") if image.get(name) is not None]
        if not found:
            return b""  # found where it is decoded: a missing image makes its sample bad, as a damaged one
        image = found[0]
        if isinstance(image, Mapping):
            raise ValueError(f"an image must be a path or bytes, got {repr(image)[:MAX_SHOWN]}")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f"an image must be a path, a data URL or bytes, got {repr(image)[:MAX_SHOWN]}")
    image.encode()  # half a surrogate pair names no file; UnicodeEncodeError is a ValueError
    return image


def image_content(image: str | bytes, roots: Sequence[Path]) -> Path | bytes:
    """Return the file or the bytes of an image. Raises ValueError where it is elsewhere than in ``roots``."""
    if isinstance(image, bytes):
        return image
    if image[:5].lower() == "data:":
        return decode_data_url(image)
    name = image
    if _SCHEME.match(image):
        parts = urlsplit(image)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise ValueError(
                f"the image {image[:MAX_SHOWN]!r} is not on this machine; download the images first and give their "
                "paths"
            )
        name = unquote(parts.path)
    return _path_below(name, roots)


def _path_below(name: str, roots: Sequence[Path]) -> Path:
    if "\0" in name or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"the image path {name[:MAX_SHOWN]!r} leads out of its folder {roots[0]}")
    path = roots[0] / name
    if not any(path.absolute().is_relative_to(root.absolute()) for root in roots):
        raise ValueError(
            f"the image path {name[:MAX_SHOWN]!r} is not below {' or '.join(map(str, dict.fromkeys(roots)))}; "
            "give paths below it, or set images of the source to their folder"
        )
    return path


def decode_data_url(url: str) -> bytes:
    """Return the bytes of an image in a data URL. Raises ValueError where it is not one, or no valid base64."""
    header = _DATA_URL.match(url)
    if header is None:
        raise ValueError(f"the data URL {url[:40]!r} is not data:image/...;base64,...")
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL {url[:40]!r} holds no valid base64: {error}") from error


def _field(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the first field of these names; raise ValueError, naming them all, where there is none."""
    for name in names:
        if entry.get(name) is not None:
            return entry[name]
    raise ValueError(f"the field {' or '.join(map(repr, names))} is missing")


def _optional(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _messages(value: Any, layout: RecordLayout, part_types: Mapping[str, Modality] = IMAGE_PARTS) -> list[_Message]:
    """Return the messages of a record: the pairs {user, assistant} as two."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"the messages must be a list, and not empty; got {repr(value)[:MAX_SHOWN]}")
    messages: list[_Message] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} must have a role and content, got {repr(message)[:MAX_SHOWN]}")
        if "user" in message and "assistant" in message:
            messages += [_message(role, message[role], number, part_types) for role in ("user", "assistant")]
            continue
        role = _field(message, layout.role)
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(
                f"message {number} has the unknown role {repr(role)[:MAX_SHOWN]}; known are {', '.join(ROLES)}"
            )
        messages.append(_message(ROLES[role], _field(message, layout.content), number, part_types))
    return messages


def _message(role: str, content: Any, number: int, part_types: Mapping[str, Modality]) -> _Message:
    text, placeholders, media = "", list[Placeholder](), list[Any]()
    for piece, modality, item in _pieces(content, number, part_types):
        text += piece
        if modality is not None:
            placeholders.append(Placeholder(len(text), modality))
            media.append(item)
    if media and role != "user":
        raise ValueError(f"message {number}, of the {role}, holds an image; only those of the user may")
    return _Message(role, text, tuple(placeholders), tuple(media))


def _pieces(
    content: Any, number: int, part_types: Mapping[str, Modality]
) -> Iterator[tuple[str, Modality | None, Any]]:
    """Yield the text of a content up to each media item, its modality and the item; the last may be without one.

    The item of a placeholder is None.
    """
    if not isinstance(content, list):
        *before, last = as_text(content, f"the content of message {number}").split(IMAGE_TOKEN)
        yield from ((text, Modality.IMAGE, None) for text in before)
        yield last, None, None
        return
    for part in content:
        if isinstance(part, str):
            yield from _pieces(part, number, part_types)
            continue
        if not isinstance(part, Mapping):
            raise ValueError(f"a part of message {number} must have a type, got {repr(part)[:MAX_SHOWN]}")
        kind = part.get("type") or ("text" if isinstance(part.get("text"), str) else None)
        if kind == "text":
            yield from _pieces(as_text(part.get("text"), f"the text of message {number}"), number, part_types)
        elif isinstance(kind, str) and kind in part_types:
            yield "", part_types[kind], _part_audio(part) if kind in AUDIO_PARTS else _part_image(part)
        else:
            raise ValueError(
                f"message {number} has a part of the unknown type {repr(kind)[:MAX_SHOWN]}; known are text, "
                f"{', '.join(part_types)}"
            )


def _part_audio(part: Mapping[str, Any]) -> Any:
    """Return the recording of a part; empty where it is absent, so that it is found where it is decoded."""
    found = part.get("input_audio")
    return "" if found is None or isinstance(found, int) else found


def _part_image(part: Mapping[str, Any]) -> Any:
    """Return the image of a part; None or its number where the record holds the images elsewhere."""
    found = [part[name] for name in ("image_url", "image", "path", "url", "bytes") if part.get(name) is not None]
    return found[0] if found else part.get("index")


def _check_order(messages: Sequence[_Message], ends_with: str = "assistant") -> None:
    """Raise ValueError unless the messages are a system message or none, then questions and answers in turn."""
    roles = [message.role for message in messages]
    start = int(roles[0] == "system")
    if "system" in roles[start:]:
        raise ValueError("a system message must be the first message of a conversation, and the only one")
    if roles[start : start + 1] == ["assistant"]:
        raise ValueError("the conversation begins with the assistant; a question must come first")
    for number in range(start + 1, len(roles)):
        if roles[number] == roles[number - 1]:
            raise ValueError(
                f"messages {number} and {number + 1} are both of the {roles[number]}; make one message of them"
            )
    if roles[-1] != ends_with:
        nothing_to = "answer to learn" if ends_with == "assistant" else "question to answer"
        raise ValueError(f"the conversation ends with the {roles[-1]}; there is no {nothing_to}")


def _record_images(entry: Mapping[str, Any], layout: RecordLayout) -> list[Any]:
    value = _optional(entry, layout.images)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def _place_images(messages: Sequence[_Message], given: list[Any]) -> list[Any]:
    """Return the images of a record in the order of its placeholders, or as given where there is no placeholder."""
    placed = [image for message in messages for image in message.media]
    numbers = [image for image in placed if image is None or isinstance(image, int)]
    if not placed:
        return given
    if len(numbers) != len(given):
        raise ValueError(f"{len(numbers)} placeholders {IMAGE_TOKEN} for {len(given)} images; give one image for each")
    order = [at if number is None else number for at, number in enumerate(numbers)]
    if sorted(order) != list(range(len(given))):
        raise ValueError(f"the image parts have the index {order[:8]}; each of {len(given)} images must be named once")
    following = (given[number] for number in order)
    return [next(following) if image is None or isinstance(image, int) else image for image in placed]
