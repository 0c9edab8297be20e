"""Render conversations and captions as samples: AKI's text formats (AKI, Table 5, and its released code).

A sample is a string in parts, and each part is tokenized by itself: no token crosses two parts, and what a token is
(prompt, image, response) is what its part is, never found by searching for a marker id. So the tokens of a prompt are
the first tokens of the sample, however its response begins. Markers are never merged with their neighbours, so this
gives the tokens of the whole string, unless a response begins with white space after a header that ends with some.

With Phi-3's markers (each family's are in its file of families/):

    fine-tuning  <s> <|system|>\\n{system}<|end|>\\n<|user|>\\n<image>\\n{prompt}<|end|>\\n<|assistant|>\\n
                 {response}<|endoftext|>
    captions     <s><image>{caption}<|endofchunk|><|endoftext|>

Text-first order, for dual-order training (AKI, Figure 4), puts the image after the question or the caption:

    fine-tuning  ... <|user|>\\n{prompt}\\n<image><|end|>\\n<|assistant|>\\n{response}<|endoftext|>
    captions     <s>{caption}<image><|endofchunk|><|endoftext|>

Prompts with placeholders (users' own data) hold their media where the placeholders stand, in any turn, and nothing is
added around them; text-first order then moves those of the first prompt to its end.

With a prefix, the first part of a caption is prompt: the image may see it under a rule that looks ahead, and the model
is trained on the rest only. The tokens are those of the caption without a prefix.

The space after <s> is the lone space token that the release's slow tokenizer puts before <|system|> (and not
before <image>), and that its inference code writes out. Newlines after Phi-3's markers vanish in tokenization; those
of the other families and the one after <image> stay, and belong to the prompt.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.families.base import ENDOFCHUNK_TOKEN, IMAGE_TOKEN
from aki_megatron.types import (
    BYTE_ORDER_MARK,
    IGNORE,
    MEDIA_MODALITIES,
    Caption,
    Conversation,
    Modality,
    Placeholder,
    Sample,
    Turn,
)

MIN_TEXT_TOKENS = 5
"""Of a caption: its start, <image>, one token of text, <|endofchunk|>, the end."""


class PromptSpan(NamedTuple):
    """Where in a part a piece of the user's own text stands: ``length`` characters of the prompt of turn ``turn``.

    start         its first character in the part
    prompt_start  its first character in Turn.prompt
    """

    turn: int
    start: int
    prompt_start: int
    length: int


class Part(NamedTuple):
    """A part of the rendered string and what its tokens are. Every RESPONSE token is supervised in training.

    prompt_spans  what of the text is the user's own; the rest is the template's
    """

    text: str
    modality: Modality
    prompt_spans: tuple[PromptSpan, ...] = ()


class PromptPiece(NamedTuple):
    """A piece of a turn's prompt: the text from its character ``offset`` on, up to the next media item or the end."""

    text: str
    offset: int


Piece = str | PromptPiece | Modality
"""A piece of a turn: text of the template, of the user, or a media item."""


@dataclass(frozen=True)
class Template:
    """Render text and images into samples, as the family of the tokenizer writes them.

    num_media_tokens  modality -> positions of one of its items (Q)
    max_text_tokens   longest text in tokens: markers and every media item (as one) count
    system_message    empty leaves the system block out
    text_first        put the media after the first question, or after the caption
    max_positions     longest training sample in positions, media included; None: any length
    max_media         largest number of media of a training sample; None: any number

    Truncation keeps the end marker. Text that holds a special token literally raises DataError: it would turn into that
    token, and any escape would train on text that the dataset does not have. So does half of a surrogate pair. In the
    system message both are a ConfigError.
    """

    tokenizer: Tokenizer
    num_media_tokens: Mapping[Modality, int]
    max_text_tokens: int
    system_message: str
    text_first: bool = False
    max_positions: int | None = None
    max_media: int | None = None

    def __post_init__(self) -> None:
        assert min(self.num_media_tokens.values()) > 0, self.num_media_tokens
        if self.max_text_tokens < MIN_TEXT_TOKENS:
            raise ConfigError(
                f"data.max_text_tokens={self.max_text_tokens} leaves no room for text beside the markers; "
                f"set it to {MIN_TEXT_TOKENS} or more (papers: 128 for captions, 512 for conversations)."
            )
        if reason := self._find_unusable(self.system_message):
            raise ConfigError(
                f"data.system_message {reason}; remove it: the markers around the system message are written by "
                "themselves."
            )

    def conversation_parts(self, conversation: Conversation) -> list[Part]:
        """Return the string of a conversation in parts; the token that ends a response belongs to it.

        Raises DataError for text that holds a special token, and for placeholders that are not those of the media.
        """
        turns, chat = conversation.turns, self.tokenizer.chat
        assert turns, conversation.key
        own = conversation.system_message
        texts = [text for turn in turns for text in (turn.prompt, turn.response)]
        self._refuse_unusable(conversation.key, *texts, *([] if own is None else [own]))
        ending, user = chat.turn_end + chat.turn_separator, chat.header("user")
        message = (self.system_message if own is None else own).removeprefix(BYTE_ORDER_MARK)
        system = f"{chat.header('system')}{message}{ending}" if message else ""
        opening, closing = f"{chat.conversation_start}{system}{user}", f"{ending}{chat.response_start}"
        parts: list[Part] = []
        for number, (turn, pieces) in enumerate(zip(turns, self._prompt_pieces(conversation), strict=True)):
            parts += _joined([opening, *pieces, closing], number)
            opening = f"{chat.turn_separator}{user}"
            last = number == len(turns) - 1
            parts.append(Part(f"{turn.response}{chat.sample_end if last else chat.turn_end}", Modality.RESPONSE))
        return parts

    def _prompt_pieces(self, conversation: Conversation) -> list[list[Piece]]:
        """Return every prompt as texts and the media between them. Raises DataError where they do not fit together."""
        media = [item.modality for item in conversation.media]
        for modality in media:
            if modality not in self.num_media_tokens:
                raise DataError(
                    f"Sample {conversation.key} holds media of modality {modality.name.lower()}, which this model has "
                    "no encoder for."
                )
        turns = conversation.turns
        placed = [placeholder.modality for turn in turns for placeholder in turn.placeholders]
        if placed and placed != media:
            raise DataError(
                f"Sample {conversation.key} has {_counted(placed)} in its prompts but {_counted(media)} beside them; "
                "give one file for each placeholder, in order."
            )
        if not placed and media:
            first = Turn(turns[0].prompt, "", tuple(Placeholder(0, modality) for modality in media))
            return [self._aki_pieces(first), *map(_placed_pieces, turns[1:])]
        pieces = [_placed_pieces(turn) for turn in turns]
        return [self._aki_pieces(turns[0]), *pieces[1:]] if self.text_first and turns[0].placeholders else pieces

    def _aki_pieces(self, turn: Turn) -> list[Piece]:
        """Return a prompt with its media before it, each followed by a newline, or after it in text-first order."""
        media = [placeholder.modality for placeholder in turn.placeholders]
        if self.text_first:
            return [PromptPiece(turn.prompt, 0), *(piece for modality in media for piece in ("\n", modality))]
        return [*(piece for modality in media for piece in (modality, "\n")), PromptPiece(turn.prompt, 0)]

    def caption_parts(self, caption: Caption) -> list[Part]:
        """Return the string of a caption in parts. Raises DataError for text that holds a special token."""
        self._refuse_unusable(caption.key, caption.text)
        chat, text = self.tokenizer.chat, caption.text.strip()
        start, image = Part(chat.caption_start, Modality.TEXT), Part(IMAGE_TOKEN, Modality.IMAGE)
        ending = f"{ENDOFCHUNK_TOKEN}{chat.sample_end}"
        if self.text_first:
            return [start, Part(text, Modality.RESPONSE), image, Part(ending, Modality.RESPONSE)]
        return [start, image, Part(f"{text}{ending}", Modality.RESPONSE)]

    def render_conversation(self, conversation: Conversation) -> Sample | None:
        """Render a training sample; None if no response has a supervised token left.

        A conversation that is truncated inside a prompt ends after the last response before it.
        """
        ids, modalities = self._tokenize(self.conversation_parts(conversation))
        num_tokens = len(ids)
        if num_tokens > self.max_text_tokens:
            del ids[self.max_text_tokens - 1 :], modalities[self.max_text_tokens - 1 :]
            while modalities and modalities[-1] != Modality.RESPONSE:
                del ids[-1], modalities[-1]
            if ids and ids[-1] == self.tokenizer.turn_end_id:
                del ids[-1], modalities[-1]
            ids.append(self.tokenizer.sample_end_id)
            modalities.append(Modality.RESPONSE)
        markers = (self.tokenizer.turn_end_id, self.tokenizer.sample_end_id)
        return self._sample(conversation, ids, modalities, markers, num_tokens)

    def render_caption(self, caption: Caption) -> Sample | None:
        """Render a pretraining sample; None if the caption is empty. Truncation keeps both end markers.

        The prefix is a fraction of what truncation leaves; at least one token stays learnt.
        """
        ids, modalities = self._tokenize(self.caption_parts(caption))
        num_tokens = len(ids)
        if num_tokens > self.max_text_tokens:
            kept = 3 if self.text_first else 2  # the image and the end markers stay
            del ids[self.max_text_tokens - kept : -kept], modalities[self.max_text_tokens - kept : -kept]
        markers = (self.tokenizer.endofchunk_id, self.tokenizer.sample_end_id)
        if caption.prefix > 0.0:
            text = [at for at, kind in enumerate(modalities) if kind == Modality.RESPONSE and ids[at] not in markers]
            for at in text[: min(int(caption.prefix * len(text)), len(text) - 1)]:
                modalities[at] = int(Modality.TEXT)
        return self._sample(caption, ids, modalities, markers, num_tokens)

    def render_prompt(self, conversation: Conversation) -> Sample:
        """Render what the model reads before it generates: all up to and including the header of the last response.

        Nothing is supervised and nothing is truncated; the last response is ignored.
        """
        ids, modalities = self._tokenize(self.conversation_parts(conversation)[:-1])
        sample = self._expand_media(conversation, ids, modalities)
        return replace(sample, targets=[IGNORE] * len(sample.token_ids))

    def _tokenize(self, parts: list[Part]) -> tuple[list[int], list[int]]:
        """Return the ids and modalities of the tokens, a media item still being one token."""
        ids: list[int] = []
        modalities: list[int] = []
        for part in parts:
            tokens = self.tokenizer.encode(part.text, after=ids[-1] if ids else None)
            ids += tokens
            modalities += [int(part.modality)] * len(tokens)
        return ids, modalities

    def _sample(
        self,
        source: Conversation | Caption,
        ids: list[int],
        modalities: list[int],
        markers: tuple[int, int],
        num_tokens: int,
    ) -> Sample | None:
        """Return the sample of ``num_tokens`` tokens that were cut to ``ids``; None without a supervised token.

        Raises DataError for a sample whose media are too many for a sequence.
        """
        response = int(Modality.RESPONSE)
        if not any(kind == response and token not in markers for token, kind in zip(ids, modalities, strict=True)):
            return None
        sample = self._expand_media(source, ids, modalities, num_cut_tokens=num_tokens - len(ids))
        if self.max_media is not None and len(sample.media) > self.max_media:
            raise DataError(
                f"Sample {source.key} holds {len(sample.media)} media, more than data.packing.max_images="
                f"{self.max_media} of a sequence; raise it, or split the sample."
            )
        if self.max_positions is not None and len(sample.token_ids) > self.max_positions:
            raise DataError(
                f"Sample {source.key} takes {len(sample.token_ids)} positions with its {len(sample.media)} media, more "
                f"than the {self.max_positions} of a sequence (data.packing.sequence_length, or "
                "model.decoder.rope.max_position_embeddings); raise it, or split the sample."
            )
        return sample

    def _expand_media(
        self, source: Conversation | Caption, ids: list[int], modalities: list[int], num_cut_tokens: int = 0
    ) -> Sample:
        """Expand media to their positions and set the targets: the next token where that is a RESPONSE.

        Media that were cut off with the end of the text are left out.
        """
        media = [at for at, kind in enumerate(modalities) if kind in MEDIA_MODALITIES]
        for at in reversed(media):
            kind = modalities[at]
            num_tokens = self.num_media_tokens[Modality(kind)]
            ids[at : at + 1] = [ids[at]] * num_tokens
            modalities[at : at + 1] = [kind] * num_tokens
        response = int(Modality.RESPONSE)
        targets = [token if kind == response else IGNORE for token, kind in zip(ids[1:], modalities[1:], strict=True)]
        return Sample(source.key, ids, modalities, [*targets, IGNORE], source.media[: len(media)], num_cut_tokens)

    def _refuse_unusable(self, key: str, *texts: str) -> None:
        for text in texts:
            if reason := self._find_unusable(text):
                raise DataError(f"Sample {key}: the text {text[:80]!r} {reason}; remove it from the data.")

    def _find_unusable(self, text: str) -> str:
        """Return what in a text of the data or of the configuration cannot be trained on; empty where nothing is."""
        if (found := self.tokenizer.find_special(text)) is not None:
            return f"contains the special token {found} literally, which would become that token"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"contains {text[error.start]!r}, half of a surrogate pair, which no tokenizer takes"
        return ""


def _placed_pieces(turn: Turn) -> list[Piece]:
    """Return a prompt with its media where their placeholders stand."""
    offsets = [0, *(placeholder.offset for placeholder in turn.placeholders), len(turn.prompt)]
    texts = [PromptPiece(turn.prompt[start:end], start) for start, end in pairwise(offsets)]
    pieces: list[Piece] = [texts[0]]
    for placeholder, text in zip(turn.placeholders, texts[1:], strict=True):
        pieces += [placeholder.modality, text]
    return pieces


def _joined(pieces: Sequence[Piece], turn: int) -> list[Part]:
    """Return the pieces of a turn as parts: adjacent texts are one part, each media item is one."""
    parts: list[Part] = []
    text = ""
    spans: list[PromptSpan] = []
    for piece in (*pieces, None):
        if isinstance(piece, PromptPiece):
            spans += [PromptSpan(turn, len(text), piece.offset, len(piece.text))] if piece.text else []
            text += piece.text
        elif isinstance(piece, str):
            text += piece
        else:
            if text:
                parts.append(Part(text, Modality.TEXT, tuple(spans)))
            if piece is not None:
                parts.append(Part(IMAGE_TOKEN, piece))
            text, spans = "", []
    return parts


def _counted(media: Sequence[Modality]) -> str:
    """Return how many media of which modality there are, for a message."""
    counts = Counter(media)
    names = [f"{count} {modality.name.lower()} item{'s' * (count > 1)}" for modality, count in counts.items()]
    return " and ".join(names) or "no media"
