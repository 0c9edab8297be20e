"""AKI's processor for plain transformers (5.x): this file is copied into an exported folder.

It turns prompts and pictures into what the model takes. ``<image>`` in a text is one picture and becomes as many places
as the resampler has latents. A text is in parts, each tokenized by itself, as in training: everything is prompt but
``<image>`` and the answers, which begin after the assistant's header and end with the marker that closes a message.
Nothing is added to a text, and nothing is cut off: write it with all its markers, or let ``apply_chat_template``.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

PAD, TEXT, RESPONSE, IMAGE = 0, 1, 2, 3
"""Values of ``modality_ids``, as in modeling_aki.py."""

_OF_NO_EFFECT = ("padding", "add_special_tokens")
"""Arguments that transformers passes to every processor."""


class AkiProcessor(ProcessorMixin):
    """Texts and pictures to input_ids, attention_mask, modality_ids and pixel_values.

    image_size        side of the square that every picture is resized to (bicubic; the aspect ratio is not kept)
    num_image_tokens  places of one picture in the text
    image_token       the token that stands for a picture
    answer_start      what an answer begins after
    answer_ends       what an answer ends with, the marker included
    """

    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any,
        image_size: int = 384,
        num_image_tokens: int = 144,
        image_token: str = "<image>",
        answer_start: str = "<|assistant|>\n",
        answer_ends: Sequence[str] = ("<|end|>", "<|endoftext|>"),
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.answer_start = answer_start
        self.answer_ends = list(answer_ends)
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] = (),
        padding_side: str = "left",
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """One row per text, padded on ``padding_side`` to the longest: left to generate, right for a forward pass.

        ``images`` (of PIL, or paths) are those of all texts in their order; they may be grouped by text.
        """
        unknown = sorted(key for key, value in kwargs.items() if value is not None and key not in _OF_NO_EFFECT)
        if unknown:
            raise ValueError(f"AkiProcessor has no {', '.join(unknown)}: texts are neither cut off nor added to.")
        texts = [text] if isinstance(text, str) else list(text)
        pictures = _flat(images)
        wanted = sum(each.count(self.image_token) for each in texts)
        if wanted != len(pictures):
            raise ValueError(f"The texts hold {wanted} times {self.image_token}, but {len(pictures)} images came.")
        rows = [self._row(each) for each in texts]
        width = max((len(ids) for ids, _ in rows), default=0)

        def padded(values: list[int], filler: int) -> list[int]:
            filling = [filler] * (width - len(values))
            return filling + values if padding_side == "left" else values + filling

        data: dict[str, Any] = {
            "input_ids": [padded(ids, self.tokenizer.pad_token_id) for ids, _ in rows],
            "attention_mask": [padded([1] * len(ids), 0) for ids, _ in rows],
            "modality_ids": [padded(modalities, PAD) for _, modalities in rows],
        }
        if pictures:
            data["pixel_values"] = np.stack([self._pixels(picture) for picture in pictures])
        return BatchFeature(data, tensor_type=return_tensors)

    def _parts(self, text: str) -> list[tuple[str, int]]:
        """The text in pieces, and what the tokens of each are."""
        ends = "|".join(map(re.escape, self.answer_ends))
        answers = rf"(?s)(?<={re.escape(self.answer_start)})(?:.*?(?:{ends})|.*)"
        parts, start = [], 0
        for answer in re.finditer(answers, text):
            parts += [(text[start : answer.start()], TEXT), (answer.group(), RESPONSE)]
            start = answer.end()
        parts.append((text[start:], TEXT))
        token = re.escape(self.image_token)
        return [
            (piece, IMAGE if piece == self.image_token else kind)
            for part, kind in parts
            for piece in re.split(f"({token})", part)
        ]

    def _row(self, text: str) -> tuple[list[int], list[int]]:
        """Token and modality ids of one text, each picture at all its places."""
        # some markers swallow the white space after them, also where it is in the next part
        swallowing = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items() if token.rstrip}
        ids: list[int] = []
        modalities: list[int] = []
        for piece, kind in self._parts(text):
            before = swallowing.get(ids[-1], "") if ids else ""
            tokens = self.tokenizer(before + piece, add_special_tokens=False)["input_ids"]
            tokens = tokens[1:] if before else tokens
            tokens = tokens * self.num_image_tokens if kind == IMAGE else tokens
            ids += tokens
            modalities += [kind] * len(tokens)
        return ids, modalities

    def _pixels(self, picture: Image.Image | str | Path) -> np.ndarray:
        """float32 [3, size, size] in [-1, 1]: bytes / 255, mean 0.5, standard deviation 0.5."""
        opened = Image.open(picture) if isinstance(picture, str | Path) else picture
        rgb = opened.convert("RGB").resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        pixels = np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1)).astype(np.float32)
        return (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [picture for group in images for picture in _flat(group)]
    return [images]
