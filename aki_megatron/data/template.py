"""Conversations and captions to samples: AKI's text formats (AKI, Table 5, and its released code).

The whole string is tokenized once, with offsets. What a token is (prompt, image, response) follows from the
part of the string in which it starts, never from a search for a marker id. Parts meet only at special tokens,
which the tokenizer never merges with their neighbours, so no token crosses two parts.

    fine-tuning  <s> <|system|>\\n{system}<|end|>\\n<|user|>\\n<image>\\n{prompt}<|end|>\\n<|assistant|>\\n
                 {response}<|endoftext|>
    captions     <s><image>{caption}<|endofchunk|><|endoftext|>

Text-first order, for dual-order training (AKI, Figure 4), puts the image after the question or the caption:

    fine-tuning  ... <|user|>\n{prompt}\n<image><|end|>\n<|assistant|>\n{response}<|endoftext|>
    captions     <s>{caption}<image><|endofchunk|><|endoftext|>

The space after <s> is the lone space token that the release's slow tokenizer puts before <|system|> (and not
before <image>), and that its inference code writes out. Newlines after chat markers vanish in tokenization;
the one after <image> stays.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from aki_megatron.data.text import ASSISTANT, BOS, END, ENDOFCHUNK, EOS, IMAGE, SYSTEM, USER, Tokenizer
from aki_megatron.flow import IGNORE, Caption, ConfigError, Conversation, DataError, Modality, Sample

FEWEST_TEXT_TOKENS = 5
"""<s>, <image>, one token of a caption, <|endofchunk|>, <|endoftext|>."""


class Part(NamedTuple):
    """A piece of the rendered string and what its tokens are. Every RESPONSE token is learnt in training."""

    text: str
    modality: Modality


@dataclass(frozen=True)
class Template:
    """Renders text and images into samples.

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
        """The string, in parts. Inner responses end with <|end|> (learnt), the last with <|endoftext|>.

        Raises DataError for text that holds a special token.
        """
        turns = conversation.turns
        assert turns, conversation.key
        self._refuse_special(conversation.key, *(text for turn in turns for text in (turn.prompt, turn.response)))
        system = f"{SYSTEM}\n{self.system_message}{END}\n" if self.system_message else ""
        parts = [Part(f"{BOS} {system}{USER}\n", Modality.TEXT)]
        image = [Part(IMAGE, Modality.IMAGE)] if conversation.image is not None else []
        closing = f"{END}\n{ASSISTANT}\n"
        for number, turn in enumerate(turns):
            opening = f"\n{USER}\n" if number else ""
            if number or not image:
                parts.append(Part(f"{opening}{turn.prompt}{closing}", Modality.TEXT))
            elif self.text_first:
                parts += [Part(f"{turn.prompt}\n", Modality.TEXT), *image, Part(closing, Modality.TEXT)]
            else:
                parts += [*image, Part(f"\n{turn.prompt}{closing}", Modality.TEXT)]
            ending = EOS if number == len(turns) - 1 else END
            parts.append(Part(f"{turn.response}{ending}", Modality.RESPONSE))
        return parts

    def caption_parts(self, caption: Caption) -> list[Part]:
        """The string of a caption, in parts."""
        self._refuse_special(caption.key, caption.text)
        text, ending, image = caption.text.strip(), f"{ENDOFCHUNK}{EOS}", Part(IMAGE, Modality.IMAGE)
        if self.text_first:
            return [
                Part(BOS, Modality.TEXT),
                Part(text, Modality.RESPONSE),
                image,
                Part(ending, Modality.RESPONSE),
            ]
        return [Part(BOS, Modality.TEXT), image, Part(f"{text}{ending}", Modality.RESPONSE)]

    def render_conversation(self, conversation: Conversation) -> Sample | None:
        """A training sample; None if no token of any response is left to learn.

        A conversation cut inside a prompt ends after the last response before it.
        """
        ids, modalities = self._tokenize(self.conversation_parts(conversation))
        if len(ids) > self.max_text_tokens:
            del ids[self.max_text_tokens - 1 :], modalities[self.max_text_tokens - 1 :]
            while modalities and modalities[-1] != Modality.RESPONSE:
                del ids[-1], modalities[-1]
            if ids and ids[-1] == self.tokenizer.end:
                del ids[-1], modalities[-1]
            ids.append(self.tokenizer.eos)
            modalities.append(Modality.RESPONSE)
        markers = (self.tokenizer.end, self.tokenizer.eos)
        return self._sample(conversation, ids, modalities, markers)

    def render_caption(self, caption: Caption) -> Sample | None:
        """A pretraining sample; None if the caption is empty. <|endofchunk|> and <|endoftext|> survive truncation."""
        ids, modalities = self._tokenize(self.caption_parts(caption))
        if len(ids) > self.max_text_tokens:
            kept = 3 if self.text_first else 2  # the image and the end markers stay
            del ids[self.max_text_tokens - kept : -kept], modalities[self.max_text_tokens - kept : -kept]
        markers = (self.tokenizer.endofchunk, self.tokenizer.eos)
        return self._sample(caption, ids, modalities, markers)

    def render_prompt(self, conversation: Conversation) -> Sample:
        """What the model reads before it generates: the conversation up to and including the last <|assistant|>.

        Nothing is learnt and nothing is truncated; the last response is not looked at.
        """
        ids, modalities = self._tokenize(self.conversation_parts(conversation)[:-1])
        sample = self._place(conversation, ids, modalities)
        return Sample(sample.key, sample.token_ids, sample.modality_ids, [IGNORE] * len(sample.token_ids), sample.image)

    def _tokenize(self, parts: list[Part]) -> tuple[list[int], list[int]]:
        """Ids and modalities of the tokens, an image still being one token."""
        ids, starts = self.tokenizer.encode_with_offsets("".join(part.text for part in parts))
        modalities: list[int] = []
        character = 0
        for part in parts:
            character += len(part.text)
            modalities += [int(part.modality)] * (bisect_left(starts, character) - len(modalities))
        assert len(modalities) == len(ids)
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
