"""AKI's processor for plain transformers (>= 5.0, < 6): this file is copied into an exported folder.

It converts texts and images to the model's inputs. ``<image>`` in a text stands for one image and becomes as many
positions as the resampler has latents. A text is split into parts, each tokenized by itself, as in training: everything
is prompt but ``<image>`` and the responses, which begin after the assistant's header and end with the token that ends a
message. Texts are neither completed nor truncated: write them with all special tokens, or use ``apply_chat_template``.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from .image_processing_aki import AkiImageProcessor, flatten_images

PAD, TEXT, RESPONSE, IMAGE = 0, 1, 2, 3
"""Values of ``modality_ids``, as in modeling_aki.py."""

_IGNORED = ("padding", "add_special_tokens")
"""Arguments that transformers passes to every processor; they have no effect."""


class AkiProcessor(ProcessorMixin):
    """Texts and images to input_ids, attention_mask, modality_ids and pixel_values.

    image_processor   makes the pixels of images (image_processing_aki.py)
    num_image_tokens  positions of one image in the text
    image_token       token that stands for an image
    response_start    text after which a response begins
    response_ends     tokens that end a response and belong to it
    system_message    what the chat template begins with where the messages have none of their own
    """

    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        num_image_tokens: int = 144,
        image_token: str = "<image>",
        response_start: str = "<|assistant|>\n",
        response_ends: Sequence[str] = ("<|end|>", "<|endoftext|>"),
        system_message: str = "",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.system_message = system_message
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.response_start = response_start
        self.response_ends = list(response_ends)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Return both parts. AutoImageProcessor asks for torchvision in some releases, which is not needed here."""
        parts = (AkiImageProcessor, AutoTokenizer)
        return [part.from_pretrained(pretrained_model_name_or_path, **kwargs) for part in parts]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] = (),
        padding_side: str = "left",
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return one sequence per text, padded to the longest.

        images        as AkiImageProcessor takes them, for all texts in order; a list, or a list per text
        text          one or several texts
        padding_side  left to generate, right for a forward pass

        Raises ValueError for arguments that it does not have, and where the texts need another number of images.
        """
        if kwargs.get("truncation") is False:
            kwargs.pop("truncation")  # what is done anyway
        unknown = sorted(key for key, value in kwargs.items() if value is not None and key not in _IGNORED)
        if unknown:
            raise ValueError(f"AkiProcessor has no {', '.join(unknown)}: texts are neither truncated nor completed.")
        texts = [text] if isinstance(text, str) else list(text)
        flat_images = flatten_images(images)
        expected = sum(each.count(self.image_token) for each in texts)
        if expected != len(flat_images):
            raise ValueError(
                f"The texts hold {self.image_token} {expected} times, but {len(flat_images)} images were given."
            )
        sequences = [self._tokenize(each) for each in texts]
        length = max((len(ids) for ids, _ in sequences), default=0)

        def padded(values: list[int], pad_value: int) -> list[int]:
            padding = [pad_value] * (length - len(values))
            return padding + values if padding_side == "left" else values + padding

        data: dict[str, Any] = {
            "input_ids": [padded(ids, self.tokenizer.pad_token_id) for ids, _ in sequences],
            "attention_mask": [padded([1] * len(ids), 0) for ids, _ in sequences],
            "modality_ids": [padded(modalities, PAD) for _, modalities in sequences],
        }
        if flat_images:
            data |= self.image_processor(flat_images)
        return BatchFeature(data, tensor_type=return_tensors)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what ``__call__`` returns."""
        return ["input_ids", "attention_mask", "modality_ids", "pixel_values"]

    def _split(self, text: str) -> list[tuple[str, int]]:
        """The parts of a text and the modality of each."""
        ends = "|".join(map(re.escape, self.response_ends))
        responses = rf"(?s)(?<={re.escape(self.response_start)})(?:.*?(?:{ends})|.*)"
        parts, start = [], 0
        for response in re.finditer(responses, text):
            parts += [(text[start : response.start()], TEXT), (response.group(), RESPONSE)]
            start = response.end()
        parts.append((text[start:], TEXT))
        token = re.escape(self.image_token)
        return [
            (piece, IMAGE if piece == self.image_token else modality)
            for part, modality in parts
            for piece in re.split(f"({token})", part)
        ]

    def _tokenize(self, text: str) -> tuple[list[int], list[int]]:
        """Token and modality ids of one text, each image with all its positions."""
        # some special tokens strip the white space after them, also where it is in the next part
        stripping = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items() if token.rstrip}
        ids: list[int] = []
        modalities: list[int] = []
        for part, modality in self._split(text):
            before = stripping.get(ids[-1], "") if ids else ""
            tokens = self.tokenizer(before + part, add_special_tokens=False)["input_ids"]
            tokens = tokens[1:] if before else tokens
            tokens = tokens * self.num_image_tokens if modality == IMAGE else tokens
            ids += tokens
            modalities += [modality] * len(tokens)
        return ids, modalities
