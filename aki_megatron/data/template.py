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

The space after <s> is the lone space token that the release's slow tokenizer puts before <|system|> (and not
before <image>), and that its inference code writes out. Newlines after Phi-3's markers vanish in tokenization; those
of the other families and the one after <image> stay, and belong to the prompt.
"""

from dataclasses import dataclass
from typing import NamedTuple

from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.families.base import ENDOFCHUNK_TOKEN, IMAGE_TOKEN
from aki_megatron.types import BYTE_ORDER_MARK, IGNORE, Caption, Conversation, Modality, Sample

MIN_TEXT_TOKENS = 5
"""Of a caption: its start, <image>, one token of text, <|endofchunk|>, the end."""


class Part(NamedTuple):
    """A part of the rendered string and what its tokens are. Every RESPONSE token is supervised in training."""

    text: str
    modality: Modality


@dataclass(frozen=True)
class Template:
    """Render text and images into samples, as the family of the tokenizer writes them.

    num_image_tokens  positions of one image (Q)
    max_text_tokens   longest text in tokens: markers and <image> (as one) count, the other image positions do not
    system_message    empty leaves the system block out
    text_first        put the image after the first question, or after the caption

    Truncation keeps the end marker. Text that holds a special token literally raises DataError: it would turn into that
    token, and any escape would train on text that the dataset does not have. So does half of a surrogate pair. In the
    system message both are a ConfigError.
    """

    tokenizer: Tokenizer
    num_image_tokens: int
    max_text_tokens: int
    system_message: str
    text_first: bool = False

    def __post_init__(self) -> None:
        assert self.num_image_tokens > 0, self.num_image_tokens
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

        Raises DataError for text that holds a special token.
        """
        turns, chat = conversation.turns, self.tokenizer.chat
        assert turns, conversation.key
        self._refuse_unusable(conversation.key, *(text for turn in turns for text in (turn.prompt, turn.response)))
        image = Part(IMAGE_TOKEN, Modality.IMAGE) if conversation.image is not None else None
        ending, user = chat.turn_end + chat.turn_separator, chat.header("user")
        message = self.system_message.removeprefix(BYTE_ORDER_MARK)
        system = f"{chat.header('system')}{message}{ending}" if message else ""
        opening, closing = f"{chat.conversation_start}{system}{user}", f"{ending}{chat.response_start}"
        parts: list[Part] = []
        for number, turn in enumerate(turns):
            if number or image is None:
                parts.append(Part(f"{opening}{turn.prompt}{closing}", Modality.TEXT))
            elif self.text_first:
                parts += [Part(f"{opening}{turn.prompt}\n", Modality.TEXT), image, Part(closing, Modality.TEXT)]
            else:
                parts += [Part(opening, Modality.TEXT), image, Part(f"\n{turn.prompt}{closing}", Modality.TEXT)]
            opening = f"{chat.turn_separator}{user}"
            last = number == len(turns) - 1
            parts.append(Part(f"{turn.response}{chat.sample_end if last else chat.turn_end}", Modality.RESPONSE))
        return parts

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
        """Render a pretraining sample; None if the caption is empty. Truncation keeps both end markers."""
        ids, modalities = self._tokenize(self.caption_parts(caption))
        num_tokens = len(ids)
        if num_tokens > self.max_text_tokens:
            kept = 3 if self.text_first else 2  # the image and the end markers stay
            del ids[self.max_text_tokens - kept : -kept], modalities[self.max_text_tokens - kept : -kept]
        markers = (self.tokenizer.endofchunk_id, self.tokenizer.sample_end_id)
        return self._sample(caption, ids, modalities, markers, num_tokens)

    def render_prompt(self, conversation: Conversation) -> Sample:
        """Render what the model reads before it generates: all up to and including the header of the last response.

        Nothing is supervised and nothing is truncated; the last response is ignored.
        """
        ids, modalities = self._tokenize(self.conversation_parts(conversation)[:-1])
        sample = self._expand_image(conversation, ids, modalities)
        return Sample(sample.key, sample.token_ids, sample.modality_ids, [IGNORE] * len(sample.token_ids), sample.image)

    def _tokenize(self, parts: list[Part]) -> tuple[list[int], list[int]]:
        """Return the ids and modalities of the tokens, an image still being one token."""
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
        """Return the sample of ``num_tokens`` tokens that were cut to ``ids``; None without a supervised token."""
        response = int(Modality.RESPONSE)
        if not any(kind == response and token not in markers for token, kind in zip(ids, modalities, strict=True)):
            return None
        return self._expand_image(source, ids, modalities, num_cut_tokens=num_tokens - len(ids))

    def _expand_image(
        self, source: Conversation | Caption, ids: list[int], modalities: list[int], num_cut_tokens: int = 0
    ) -> Sample:
        """Expand the image to its positions and set the targets: the next token where that is a RESPONSE."""
        image = int(Modality.IMAGE)
        if image in modalities:
            at = modalities.index(image)
            ids[at : at + 1] = [ids[at]] * self.num_image_tokens
            modalities[at : at + 1] = [image] * self.num_image_tokens
        response = int(Modality.RESPONSE)
        targets = [token if kind == response else IGNORE for token, kind in zip(ids[1:], modalities[1:], strict=True)]
        return Sample(source.key, ids, modalities, [*targets, IGNORE], source.image, num_cut_tokens)

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
