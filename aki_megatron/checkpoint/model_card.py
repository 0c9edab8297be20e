"""The model card of an exported folder (README.md): what it is, how to run it, what cannot run it, and its licences."""

import re
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml
from PIL import Image, ImageDraw

from aki_megatron.checkpoint.shapes import num_parameters
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.data import ImagesConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.families.base import Licence, PublishedModel
from aki_megatron.families.registry import FAMILIES

SIGLIP = PublishedModel("google/siglip-so400m-patch14-384", 1152, 27, Licence("apache-2.0"))
"""The published vision encoder, recognized by its sizes."""

_TEXT = Path(__file__).with_name("model_card.md")
"""The card below its front matter, with $names that model_card fills in."""

_RULES = {
    "causal": "every position attends to what precedes it.",
    "mma": "modality-mutual attention. Image positions attend to what precedes them and also to the text after them in "
    "the prompt of their turn, so that an image is read with the question in view. All other positions, and every "
    "generated token, attend to what precedes them.",
}
"""Exported attention rule -> what it says."""

_CAUSAL_LIMITS = """\
- vLLM, SGLang, TGI, TensorRT-LLM, llama.cpp, Ollama and MLX: they have no implementation of this architecture (model \
type `aki`).
- In transformers, static caches (`cache_implementation="static"`) raise an error, and so do other attention \
implementations than `sdpa` and `eager`."""

_MUTUAL_LIMITS = """\
- vLLM, SGLang, TGI, TensorRT-LLM, llama.cpp, Ollama and MLX: they have no implementation of this architecture (model \
type `aki`), and their mask for the prompt is causal. Under a causal mask the image positions do not see the question, \
and the answers are others, without any error. Prefix caches and a prefill in pieces are wrong for this rule as well: \
what an image position holds depends on the text after it.
- In transformers, `flash_attention_2`, `flash_attention_3`, `flex_attention` and static caches \
(`cache_implementation="static"`) take no such mask and raise an error; `sdpa` and `eager` work. Images without \
`modality_ids` raise an error too: the rule could not be applied.
- A prompt cannot be continued from a cache that ends between an image and the text that the image attends to."""


def model_card(
    config: ModelConfig, attention: AttentionConfig, dtype: torch.dtype, system_message: str, images: ImagesConfig
) -> str:
    """Return the model card with its YAML front matter.

    dtype           of the weights
    system_message  of the chat template; empty: none
    images          how pixels are made
    """
    family, decoder, vision = FAMILIES[config.decoder.family], config.decoder, config.vision
    language = family.published_model(decoder.hidden_size, decoder.num_layers)
    is_siglip = (vision.hidden_size, vision.num_layers) == (SIGLIP.hidden_size, SIGLIP.num_layers)
    encoder = SIGLIP if is_siglip else None
    name = language.hub_id.partition("/")[2] if language else f"{decoder.family} of {decoder.num_layers} layers"
    white, turned = images.transparency == "white", images.exif_rotation
    text = Template(_TEXT.read_text(encoding="utf-8")).substitute(
        title=f"AKI with {name}",
        parameters=f"{num_parameters(config):,}",
        dtype=str(dtype).removeprefix("torch."),
        image_size=vision.image_size,
        vision_layers=vision.num_layers,
        vision_size=vision.hidden_size,
        vision=_published_columns(encoder),
        latents=config.resampler.num_latents,
        resampler_layers=config.resampler.num_layers,
        family=decoder.family,
        decoder_layers=decoder.num_layers,
        decoder_size=decoder.hidden_size,
        decoder=_published_columns(language),
        example="example.png",
        system=_block(system_message) if system_message else "none",
        transparency="Transparent ones are laid on white." if white else "Transparency is ignored.",
        rotation=f"Photographs are {'' if turned else 'not '}turned as their EXIF orientation says.",
        rule=attention.rule,
        rule_text=_RULES[attention.rule],
        limits=_CAUSAL_LIMITS if attention.rule == "causal" else _MUTUAL_LIMITS,
        licence=_licence_text(language),
    )
    front_matter = yaml.safe_dump(_front_matter(encoder, language), sort_keys=False)
    return f"---\n{front_matter}---\n{text}"


def _front_matter(encoder: PublishedModel | None, language: PublishedModel | None) -> dict[str, Any]:
    """Metadata that the Hub reads. Where the language model is not recognized, neither is the licence."""
    licence = language.licence if language else Licence("other", "that-of-the-base-models")
    metadata = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
    metadata = {key: value for key, value in metadata.items() if value}
    known = [model.hub_id for model in (language, encoder) if model]
    tags = ["aki", "siglip", "perceiver-resampler", "custom_code"]
    return {
        **metadata,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": known} if known else {}),
        "tags": tags,
    }


def _published_columns(model: PublishedModel | None) -> str:
    if model is None:
        return "none known | that of the weights it was started from"
    link = f"[{model.hub_id}](https://huggingface.co/{model.hub_id})"
    return f"{link} | {model.licence.name or model.licence.id}"


def _licence_text(language: PublishedModel | None) -> str:
    if language is None:
        return "That of the weights that it was started from: their sizes are those of no published model known here."
    return f"Its weights derive from those of a language model, whose licence they pass on ({language.hub_id})."


def _block(text: str) -> str:
    """Text of any characters as a block of Markdown inside a list, fenced by more backticks than it has in a row."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "".join(f"\n  {line}".rstrip(" ") for line in (f"{fence}text", *text.splitlines(), fence))


def draw_example() -> bytes:
    """Return the PNG in the card's example: a red circle beside a blue square on a transparent ground."""
    image = Image.new("RGBA", (384, 256), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 48, 200, 208), fill=(200, 30, 30, 255))
    draw.rectangle((224, 72, 336, 184), fill=(30, 60, 200, 255))
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
