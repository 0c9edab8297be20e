"""The final check of an export: the folder's own code generates the tokens that our code generates.

The folder's processor makes the inputs of a few prompts from messages, and its model continues them greedily. Ours does
the same from the checkpoint's tokenizer, system message and image settings. Weights are compared elsewhere
(checkpoint/logits_check.py), so both sides share them here, and of a large model the first layers are enough.
"""

import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aki_megatron.checkpoint.hf_config import read_config_json
from aki_megatron.checkpoint.hf_export import EXAMPLE_IMAGE, export_names, exported_source
from aki_megatron.checkpoint.logits_check import TOLERANCE, stage_from_tensors
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.checkpoint.run_text import run_images, run_system_message
from aki_megatron.checkpoint.shapes import num_parameters
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSpec, to_native
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.data.image import ImageOptions
from aki_megatron.data.media import media_decoders, num_media_tokens
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer, open_fast_tokenizer
from aki_megatron.errors import CheckpointError
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.runner import collate_prompts, read_prompt
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.stage import Stage
from aki_megatron.types import Batch, Conversation, Modality, Sample, Turn, image_items

WHOLE_MODEL_BYTES = 10**9
"""A model of more bytes in fp32 is checked with its first NUM_LAYERS layers."""

NUM_LAYERS = 2
"""Decoder and encoder layers of a large model that take part: enough for a cache of several layers."""

MAX_NEW_TOKENS = 12

LOGITS_TOLERANCE = 10 * TOLERANCE
"""Largest difference of two logits, relative to the largest, that passes: the two sides order sums differently."""

QUESTION = "What is in the picture?"
DIALOGUES = (
    (True, (Turn(QUESTION, ""),)),
    (False, (Turn("Name a color, a number and an animal.", ""),)),
    (True, (Turn(QUESTION, "A circle and a square."), Turn("Which of them is red?", ""))),
)
"""Whether a prompt has an image, and its turns; the last response is generated."""

PACKAGE = "aki_exported"
"""Name under which the folder's files are imported."""


class Continuation(NamedTuple):
    """What one side generates after a prompt."""

    token_ids: list[int]
    logits: Tensor
    """[tokens, V], those that each token was chosen by."""


def check_generation(folder: Path, checkpoint: Path, tokenizer: Path) -> str:
    """Compare inputs and greedy tokens of an exported folder with ours; return a sentence for the report.

    checkpoint  the checkpoint that was exported, with the settings of its run
    tokenizer   folder of the run's tokenizer

    Raises CheckpointError where inputs, stop tokens or generated tokens differ.
    """
    exported = exported_source(folder)
    config, attention = first_layers(exported.config), AttentionConfig.model_validate({"rule": exported.rule})
    message, images = run_system_message(checkpoint), run_images(checkpoint)
    chat = FAMILIES[config.decoder.family].chat
    template = Template(Tokenizer(tokenizer, chat), num_media_tokens(config), 4096, message)
    dialogues = [
        Conversation(f"prompt {number}", turns, image_items(folder / EXAMPLE_IMAGE if has_image else None))
        for number, (has_image, turns) in enumerate(DIALOGUES, start=1)
    ]
    decoders = media_decoders(config, ImageOptions(images.transparency, images.exif_rotation))
    prompts = [read_prompt(each, template, decoders) for each in dialogues]
    batch = collate_prompts(prompts, template, config.vision.image_size)
    _check_stop_ids(folder, template.tokenizer)
    with exported_code(folder) as module, quiet():
        inputs = open_processor(folder, module).apply_chat_template(
            [_messages(each) for each in dialogues],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        _check_inputs(inputs, prompts, batch)
        model = _model(folder, config, module)
        found = _generate(model, inputs)
        stage = _native_stage(model, config, attention)
    logits: list[Tensor] = []
    tokens = generate(stage, batch, stop_ids=(), max_new_tokens=MAX_NEW_TOKENS, on_logits=logits.append)
    ours = torch.stack(logits, dim=1)[..., : config.decoder.total_vocab_size]
    expected = [Continuation(*row) for row in zip(tokens, ours, strict=True)]
    num_compared = sum(_compare(*row) for row in zip(prompts, found, expected, strict=True))
    layers = (config.decoder.num_layers, exported.config.decoder.num_layers)
    part = "" if layers[0] == layers[1] else f" (with the first {layers[0]} of {layers[1]} decoder layers)"
    return (
        f"passed. The folder's own code continues {len(prompts)} prompts, two with an image, with the {num_compared} "
        f"tokens that ours does{part}"
    )


def first_layers(config: ModelConfig) -> ModelConfig:
    """Return the model, or one of its first layers where it is large."""
    decoder, vision = config.decoder, config.vision
    if 4 * num_parameters(config) <= WHOLE_MODEL_BYTES:
        return config
    return config.model_copy(
        update={
            "decoder": decoder.model_copy(update={"num_layers": min(NUM_LAYERS, decoder.num_layers)}),
            "vision": vision.model_copy(update={"num_layers": min(NUM_LAYERS, vision.num_layers)}),
        }
    )


@contextmanager
def exported_code(folder: Path) -> Iterator[Callable[[str], ModuleType]]:
    """A function that imports the folder's files by name, from where they lie; they are forgotten in the end.

    transformers would copy them into the user's cache. No compiled file is left in the folder.
    """
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    writes_no_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules[PACKAGE] = package
    importlib.invalidate_caches()
    try:
        yield lambda name: importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        sys.dont_write_bytecode = writes_no_bytecode
        for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
            del sys.modules[name]


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' progress bars, and its warnings about a folder that is loaded in pieces."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def open_processor(folder: Path, module: Callable[[str], ModuleType]) -> Any:
    """Return the folder's processor; ``module`` imports the folder's files by name."""
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    for key in ("processor_class", "auto_map"):
        del settings[key]
    return module("processing_aki").AkiProcessor(
        module("image_processing_aki").AkiImageProcessor.from_pretrained(str(folder)),
        open_fast_tokenizer(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings,
    )


def _model(folder: Path, config: ModelConfig, module: Callable[[str], ModuleType]) -> Any:
    """The folder's model in fp32, with as many layers as ``config``."""
    config_json = read_config_json(folder)
    for key in ("auto_map", "dtype", "architectures"):
        config_json.pop(key, None)
    for key, num_layers in (("text_config", config.decoder.num_layers), ("vision_config", config.vision.num_layers)):
        config_json[key]["num_hidden_layers"] = num_layers
    weights = open_safetensors(folder)
    state = {name: weights.get(name).float() for names in export_names(config).values() for name in names}
    modelling = module("modeling_aki")
    model, loaded = modelling.AkiForConditionalGeneration.from_pretrained(
        None,
        config=module("configuration_aki").AkiConfig(**config_json),
        state_dict=state,
        dtype=torch.float32,
        output_loading_info=True,
    )
    if differences := [f"{kind}: {', '.join(sorted(map(str, names)))}" for kind, names in loaded.items() if names]:
        raise _error(f"its model does not take its tensors ({'; '.join(differences)})")
    model.generation_config.eos_token_id = None  # to compare as many tokens as there are
    return model.eval()


def _native_stage(model: Any, config: ModelConfig, attention: AttentionConfig) -> Stage:
    """Our model with the tensors of the folder's."""
    tensors: dict[str, Tensor] = model.state_dict()
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    source = LazyTensors(specs, {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()})  # type: ignore[misc]
    native = to_native(source, export_names(config))
    return stage_from_tensors(config, range(config.decoder.num_layers), attention, native.get).eval()


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation for transformers, without the last response."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(conversation.turns):
        images = [{"type": "image", "path": str(image)} for image in conversation.images if number == 0]
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.prompt}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.response}]})
    return messages[:-1]


@torch.no_grad()
def _generate(model: Any, inputs: Mapping[str, Tensor]) -> list[Continuation]:
    generated = model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = generated.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [Continuation(*row) for row in zip(tokens, torch.stack(generated.logits, dim=1), strict=True)]


def _check_stop_ids(folder: Path, tokenizer: Tokenizer) -> None:
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    if set(settings["eos_token_id"]) != tokenizer.stop_ids or settings["pad_token_id"] != tokenizer.pad_id:
        raise _error(
            f"generation_config.json has eos_token_id={settings['eos_token_id']} and "
            f"pad_token_id={settings['pad_token_id']}, the run {sorted(tokenizer.stop_ids)} and {tokenizer.pad_id}"
        )


def _check_inputs(inputs: Mapping[str, Tensor], prompts: Sequence[Sample], batch: Batch) -> None:
    for row, prompt in enumerate(prompts):
        valid = inputs["attention_mask"][row] == 1
        for name, expected in (("input_ids", prompt.token_ids), ("modality_ids", prompt.modality_ids)):
            if (found := inputs[name][row][valid].tolist()) != expected:
                raise _error(f"its processor gives other {name} for {prompt.key}: {found} instead of {expected}")
        if bool((inputs["modality_ids"][row][~valid] != int(Modality.PAD)).any()):
            raise _error(f"its processor gives modality_ids to the padding of {prompt.key}")
    if not torch.equal(inputs["pixel_values"], batch.media[Modality.IMAGE]):
        raise _error(f"its processor gives other pixel_values than training for {EXAMPLE_IMAGE}")


def _compare(prompt: Sample, found: Continuation, expected: Continuation) -> int:
    """Return how many tokens are equal: all, or those before two logits that are equal but for rounding.

    Raises CheckpointError for other logits, or for other tokens.
    """
    for step, (token, other) in enumerate(zip(found.token_ids, expected.token_ids, strict=True)):
        limit = LOGITS_TOLERANCE * float(expected.logits[step].abs().max())
        difference = float((found.logits[step] - expected.logits[step]).abs().max())
        if not difference <= limit:  # not <=: NaN differs
            raise _error(
                f"its model gives logits for {prompt.key} that differ by {difference:.1e} from ours at new token "
                f"{step + 1} (limit {limit:.1e}); it continues with {found.token_ids}, ours with {expected.token_ids}"
            )
        if token != other:
            return step  # two logits are the largest, but for rounding
    return len(found.token_ids)


def _error(difference: str) -> CheckpointError:
    return CheckpointError(
        f"The exported folder does not generate what the run generates, and nothing is left of it: {difference}."
    )
