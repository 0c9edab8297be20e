"""The messages of a request: parsed, limited, their media fetched from the request itself, rendered as in training."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aki_megatron.data.media import Decoders, media_decoders
from aki_megatron.data.sources.chat_record import ChatPrompt, decode_data_url, image_reference, parse_prompt
from aki_megatron.data.sources.records import MALFORMED
from aki_megatron.errors import DataError
from aki_megatron.evaluate.loading import LoadedModel
from aki_megatron.evaluate.runner import read_prompt
from aki_megatron.evaluate.serving.errors import ApiError, bad_request
from aki_megatron.evaluate.serving.limits import Limits
from aki_megatron.types import Conversation, MediaItem, Modality, Placeholder, Sample, Turn

ATTACHMENT = "attachment:"
"""How a part names a file of the same form: ``attachment:FIELD``."""

KEY = "request"
"""What errors of the data's readers call a sample of a server."""


@dataclass(frozen=True)
class PromptReader:
    """Make prompts of messages, for one model.

    image_newline  put a line break after an image that a text follows, as AKI's fine-tuning format has it after the
                   images before a question; otherwise nothing is added to what the messages say
    """

    model: LoadedModel
    limits: Limits
    image_newline: bool = False

    def __post_init__(self) -> None:
        config = self.model.stage.config
        decoders = media_decoders(config, self.model.images, max_pixels=self.limits.image_pixels)
        object.__setattr__(self, "_decoders", decoders)

    def read(self, messages: Any, files: Mapping[str, bytes]) -> Sample:
        """Return the prompt of a request, its media decoded.

        files  the files of a form by name of their field

        Raises ApiError (400, 413) for messages, media or lengths that are refused.
        """
        return self._read(messages, files)[1]

    def read_conversation(self, messages: Any, files: Mapping[str, bytes]) -> Conversation:
        """Return the conversation of a request, its media decoded. Takes and raises what ``read`` does."""
        conversation, prompt = self._read(messages, files)
        return replace(conversation, media=prompt.media)

    def _read(self, messages: Any, files: Mapping[str, bytes]) -> tuple[Conversation, Sample]:
        try:
            parsed = parse_prompt(messages, with_audio=self.model.stage.config.audio is not None)
        except MALFORMED as error:
            raise bad_request(f"messages: {error}.", "messages") from error
        self._check_sizes(parsed)
        if self.image_newline:
            parsed = parsed._replace(turns=tuple(_with_newlines(turn) for turn in parsed.turns))
        media = tuple(MediaItem(modality, _content(modality, item, files)) for modality, item in parsed.media)
        conversation = Conversation(KEY, parsed.turns, media, parsed.system_message)
        decoders: Decoders = self._decoders  # type: ignore[attr-defined]
        try:
            prompt = read_prompt(conversation, self.model.template, decoders)
        except DataError as error:
            raise bad_request(str(error), "messages") from error
        if len(prompt.token_ids) >= self.positions:
            raise bad_request(
                f"The prompt takes {len(prompt.token_ids)} positions, its images included; this server has "
                f"{self.positions} for a prompt and its answer. Shorten it, or send fewer images.",
                "messages",
                "context_length_exceeded",
            )
        return conversation, prompt

    @property
    def positions(self) -> int:
        """Longest prompt and answer together."""
        model = self.model.stage.config.decoder.rope.max_position_embeddings
        return min(self.limits.positions, model)

    def _check_sizes(self, parsed: ChatPrompt) -> None:
        if len(parsed.media) > self.limits.media:
            raise ApiError(
                413, f"{len(parsed.media)} images in a request; at most {self.limits.media} are taken.", "messages"
            )
        texts = [parsed.system_message or "", *(text for turn in parsed.turns for text in (turn.prompt, turn.response))]
        if (length := sum(map(len, texts))) > self.limits.text_chars:
            raise ApiError(413, f"{length} characters; at most {self.limits.text_chars} are taken.", "messages")


def _content(modality: Modality, item: Any, files: Mapping[str, bytes]) -> bytes:
    """Return the encoded bytes of an item. Raises ApiError where they are not in the request."""
    try:
        if modality == Modality.AUDIO:
            return _recording(item, files)
        reference = image_reference(item)
        if not isinstance(reference, str):  # JSON holds no bytes, so these are the none of an empty part
            raise ValueError("an image part holds no image")
        if reference[:5].lower() == "data:":
            return decode_data_url(reference)
        return _attachment(reference, files)
    except ValueError as error:
        raise bad_request(f"messages: {error}.", "messages") from error


def _attachment(reference: str, files: Mapping[str, bytes]) -> bytes:
    shown = ascii(reference[:80])
    if not reference.startswith(ATTACHMENT):
        raise ValueError(
            f"the image {shown} is not in the request, and nothing is fetched; send it as data:image/png;base64,... or "
            f"as a file of a form (multipart/form-data) with the url {ATTACHMENT}FIELD"
        )
    name = reference.removeprefix(ATTACHMENT)
    if name not in files:
        listed = ", ".join(sorted(files)[:8]) or "no file"
        raise ValueError(f"the form has no file {ascii(name[:80])} ({listed})")
    return files[name]


def _recording(item: Any, files: Mapping[str, bytes]) -> bytes:
    """Return a recording of a part ``input_audio``: {data: base64, format: wav}."""
    data = item.get("data") if isinstance(item, Mapping) else item
    if not isinstance(data, str) or not data:
        raise ValueError('input_audio must be {"data": base64 of a WAV file, "format": "wav"}')
    if data.startswith(ATTACHMENT):
        return _attachment(data, files)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"input_audio holds no valid base64: {error}") from error


def _with_newlines(turn: Turn) -> Turn:
    """Return a turn with a line break after every item that something else follows."""
    prompt, placed, added = turn.prompt, list[Placeholder](), 0
    for placeholder in turn.placeholders:
        at = placeholder.offset + added
        placed.append(replace(placeholder, offset=at))
        if placeholder.offset < len(turn.prompt) and not prompt.startswith("\n", at):
            prompt = f"{prompt[:at]}\n{prompt[at:]}"
            added += 1
    return replace(turn, prompt=prompt, placeholders=tuple(placed))
