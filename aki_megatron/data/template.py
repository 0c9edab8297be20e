"""Conversations and captions to samples: AKI's text formats (AKI, Table 5, and its released code).

A sample is a string in parts, and each part is tokenized by itself: no token crosses two parts, and what a token is
(prompt, image, response) is what its part is, never found by searching for a marker id. So the tokens of a prompt are
the first tokens of the sample, however its response begins. Markers are never merged with their neighbours, so this
gives the tokens of the whole string, unless a response begins with white space after a header that ends with some.

With Phi-3's markers (the families' are in data/chat.py):

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

from aki_megatron.data.chat import ENDOFCHUNK, IMAGE
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.types import IGNORE, Caption, Conversation, Modality, Sample

FEWEST_TEXT_TOKENS = 5
"""Of a caption: its start, <image>, one token of text, <|endofchunk|>, the end."""


class Part(NamedTuple):
    """A piece of the rendered string and what its tokens are. Every RESPONSE token is learnt in training."""

    text: str
    modality: Modality


@dataclass(frozen=True)
class Template:
    """Renders text and images into samples, as the family of the tokenizer writes them.

    image_tokens     places of one image (Q)
    max_text_tokens  longest text in tokens: markers and <image> (as one) count, image places do not
    system_message   empty leaves the system block out
    text_first       the image stands after the first question, or after the caption

    The end marker survives truncation. Text that holds a special token literally raises DataError: it would
    turn into that token, and any escape would train on text the dataset does not have.
    """

    tokenizer: Tokenizer
    image_tokens: int
    max_text_tokens: int
    system_message: str
    text_first: bool = False

    def __post_init__(self) -> None:
        assert self.image_tokens > 0, self.image_tokens
        if self.max_text_tokens < FEWEST_TEXT_TOKENS:
            raise ConfigError(
                f"data.max_text_tokens={self.max_text_tokens} leaves no room for text beside the markers; "
                f"set it to {FEWEST_TEXT_TOKENS} or more (papers: 128 for captions, 512 for conversations)."
            )

    def conversation_parts(self, conversation: Conversation) -> list[Part]:
        """The string, in parts. Inner responses end with the chat's ``close``, the last with its ``final``: all learnt.

        Raises DataError for text that holds a special token.
        """
        turns, chat = conversation.turns, self.tokenizer.chat
        assert turns, conversation.key
        self._refuse_special(conversation.key, *(text for turn in turns for text in (turn.prompt, turn.response)))
        image = Part(IMAGE, Modality.IMAGE) if conversation.image is not None else None
        ending, user = chat.close + chat.after, chat.opening("user")
        system = f"{chat.opening('system')}{self.system_message}{ending}" if self.system_message else ""
        opening, closing = f"{chat.start}{system}{user}", f"{ending}{chat.answer_start}"
        parts: list[Part] = []
        for number, turn in enumerate(turns):
            if number or image is None:
                parts.append(Part(f"{opening}{turn.prompt}{closing}", Modality.TEXT))
            elif self.text_first:
                parts += [Part(f"{opening}{turn.prompt}\n", Modality.TEXT), image, Part(closing, Modality.TEXT)]
            else:
                parts += [Part(opening, Modality.TEXT), image, Part(f"\n{turn.prompt}{closing}", Modality.TEXT)]
            opening = f"{chat.after}{user}"
            last = number == len(turns) - 1
            parts.append(Part(f"{turn.response}{chat.final if last else chat.close}", Modality.RESPONSE))
        return parts

    def caption_parts(self, caption: Caption) -> list[Part]:
        """The string of a caption, in parts."""
        self._refuse_special(caption.key, caption.text)
        chat, text = self.tokenizer.chat, caption.text.strip()
        start, image = Part(chat.caption_start, Modality.TEXT), Part(IMAGE, Modality.IMAGE)
        ending = f"{ENDOFCHUNK}{chat.final}"
        if self.text_first:
            return [start, Part(text, Modality.RESPONSE), image, Part(ending, Modality.RESPONSE)]
        return [start, image, Part(f"{text}{ending}", Modality.RESPONSE)]

    def render_conversation(self, conversation: Conversation) -> Sample | None:
        """A training sample; None if no token of any response is left to learn.

        A conversation cut inside a prompt ends after the last response before it.
        """
        ids, modalities = self._tokenize(self.conversation_parts(conversation))
        if len(ids) > self.max_text_tokens:
            del ids[self.max_text_tokens - 1 :], modalities[self.max_text_tokens - 1 :]
            while modalities and modalities[-1] != Modality.RESPONSE:
                del ids[-1], modalities[-1]
            if ids and ids[-1] == self.tokenizer.close:
                del ids[-1], modalities[-1]
            ids.append(self.tokenizer.final)
            modalities.append(Modality.RESPONSE)
        markers = (self.tokenizer.close, self.tokenizer.final)
        return self._sample(conversation, ids, modalities, markers)

    def render_caption(self, caption: Caption) -> Sample | None:
        """A pretraining sample; None if the caption is empty. Both end markers survive truncation."""
        ids, modalities = self._tokenize(self.caption_parts(caption))
        if len(ids) > self.max_text_tokens:
            kept = 3 if self.text_first else 2  # the image and the end markers stay
            del ids[self.max_text_tokens - kept : -kept], modalities[self.max_text_tokens - kept : -kept]
        markers = (self.tokenizer.endofchunk, self.tokenizer.final)
        return self._sample(caption, ids, modalities, markers)

    def render_prompt(self, conversation: Conversation) -> Sample:
        """What the model reads before it generates: the conversation up to and including the last answer's header.

        Nothing is learnt and nothing is truncated; the last response is not looked at.
        """
        ids, modalities = self._tokenize(self.conversation_parts(conversation)[:-1])
        sample = self._place(conversation, ids, modalities)
        return Sample(sample.key, sample.token_ids, sample.modality_ids, [IGNORE] * len(sample.token_ids), sample.image)

    def _tokenize(self, parts: list[Part]) -> tuple[list[int], list[int]]:
        """Ids and modalities of the tokens, an image still being one token."""
        ids: list[int] = []
        modalities: list[int] = []
        for part in parts:
            tokens = self.tokenizer.encode(part.text, after=ids[-1] if ids else None)
            ids += tokens
            modalities += [int(part.modality)] * len(tokens)
        return ids, modalities

    def _sample(
        self, source: Conversation | Caption, ids: list[int], modalities: list[int], markers: tuple[int, int]
    ) -> Sample | None:
        response = int(Modality.RESPONSE)
        if not any(kind == response and token not in markers for token, kind in zip(ids, modalities, strict=True)):
            return None
        return self._place(source, ids, modalities)

    def _place(self, source: Conversation | Caption, ids: list[int], modalities: list[int]) -> Sample:
        """Give the image its places and every place its target: the next token where that is a RESPONSE."""
        image = int(Modality.IMAGE)
        if image in modalities:
            at = modalities.index(image)
            ids[at : at + 1] = [ids[at]] * self.image_tokens
            modalities[at : at + 1] = [image] * self.image_tokens
        response = int(Modality.RESPONSE)
        targets = [token if kind == response else IGNORE for token, kind in zip(ids[1:], modalities[1:], strict=True)]
        return Sample(source.key, ids, modalities, [*targets, IGNORE], source.image)

    def _refuse_special(self, key: str, *texts: str) -> None:
        for text in texts:
            found = self.tokenizer.find_special(text)
            if found is not None:
                raise DataError(
                    f"Sample {key}: the text {text[:80]!r} contains the special token {found} literally, "
                    "which would become that token; remove it from the data."
                )
