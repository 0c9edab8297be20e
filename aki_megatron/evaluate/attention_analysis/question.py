"""What one image's tokens attend to in one question, and where in the picture those look that attend to a word.

    attention = inspect_question(model, template, conversation)
    for word in attention.words:
        print(word.text, word.mass)
    heat = attention.grid[:, :, 3]  # for the fourth word; rows from the top of the picture

Q latents of the image, P patches (grid_height x grid_width), W words.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aki_megatron.data.image import OFFICIAL_OPTIONS, ImageOptions
from aki_megatron.data.media import media_decoders
from aki_megatron.data.prompt_tokens import locate_prompt
from aki_megatron.data.template import Template
from aki_megatron.errors import DataError
from aki_megatron.evaluate.attention_analysis.capture import AttentionCapture, RowTable, Window, chosen_layers
from aki_megatron.evaluate.attention_analysis.resampler_attention import capture_patches, join_layers
from aki_megatron.evaluate.attention_analysis.words import join_words, split_words, tokens_of_words
from aki_megatron.evaluate.runner import collate_prompts, read_prompt
from aki_megatron.model.stage import Stage
from aki_megatron.types import Batch, Conversation, Modality, stack_ids


@dataclass(frozen=True)
class QuestionWord:
    """A word of the question, or several that one token stands for together.

    start, end  its characters of the turn's prompt
    num_tokens  tokens that stand for it
    mass        attention of the image's tokens to it: summed over its tokens, mean over layers, heads and latents
    is_later    whether it comes after the image, so that only a rule that looks ahead lets the image see it; under
                ``causal``, ``mixed`` and ``cca`` its mass is exactly 0
    """

    text: str
    start: int
    end: int
    num_tokens: int
    mass: float
    is_later: bool


@dataclass(frozen=True)
class QuestionAttention:
    """How the tokens of one image attend to the words of the question in the image's turn.

    rule            the model's attention rule
    layers          decoder layers of which these are means
    words           of the question, in order
    latent_words    [Q, W] attention of each latent to each word; its mean over latents is QuestionWord.mass
    latent_patches  [Q, H, W] where in the picture each latent looks, by the resampler's cross-attention; sums to 1
    grid            [H, W, number of words] the mass of a word spread over the picture: for each patch the mean over
                    latents of latent_words * latent_patches; the sum over patches is the word's mass
    base_grid       [H, W] mean of latent_patches: where latents look whatever the word; ``grid`` divided by the word's
                    mass is above it where the latents that attend to the word look more than the others

    All tensors are fp32 on the CPU. The picture is stretched to a square for the encoder, so the patches of the grid
    are parts of the whole picture, whatever its shape. That latents stand for patches by the resampler's attention is
    this project's construction: the papers do not say how they map tokens to pixels.
    """

    rule: str
    layers: tuple[int, ...]
    words: tuple[QuestionWord, ...]
    latent_words: Tensor
    latent_patches: Tensor
    grid: Tensor
    base_grid: Tensor


def inspect_question(
    model: Stage,
    template: Template,
    conversation: Conversation,
    *,
    layers: Collection[int] | None = None,
    image: int = 0,
    resampler_layers: str = "mean",
    image_options: ImageOptions = OFFICIAL_OPTIONS,
) -> QuestionAttention:
    """Run the prompt of a conversation once and return what one of its images attends to.

    model             whole, in one process
    conversation      up to the question; its last response is ignored. The question is that of the image's own turn:
                      no rule lets an image see later turns
    layers            decoder layers to average over; None: all
    image             which image of the conversation, from 0
    resampler_layers  "mean" or "last": whose cross-attention says where a latent looks

    Raises DataError where the conversation has no such image, or an image cannot be read; ConfigError for layers that
    the model does not have. Memory is that of the prompt's forward pass and a few tensors of at most 64 MiB.
    """
    chosen = chosen_layers(model, layers)
    layout = locate_prompt(template, conversation)
    images = [run for run in layout.media if run.modality == Modality.IMAGE]
    if not 0 <= image < len(images):
        raise DataError(f"Conversation {conversation.key} has {len(images)} images; there is no number {image}.")
    run = images[image]
    prompt = conversation.turns[run.turn].prompt
    tokens = [token for token in layout.tokens if token.turn == run.turn]
    words = join_words(split_words(prompt), tokens, prompt)
    positions = tokens_of_words(words, tokens)
    keys = [position for found in positions for position in found]
    window = Window(np.arange(run.start, run.end), np.array(keys, dtype=np.int64))
    table = RowTable([window], len(chosen), model.config.decoder.num_heads)
    batch = prompt_batch(model, template, conversation, image_options)
    with AttentionCapture(model, [window], chosen, table), capture_patches(model) as patches:
        prefill(model, batch)
    owner = torch.tensor([number for number, found in enumerate(positions) for _ in found], dtype=torch.int64)
    latent_words = torch.zeros(run.end - run.start, len(words)).index_add_(1, owner, table.tables[0])
    side = model.config.vision.image_size // model.config.vision.patch_size
    latent_patches = join_layers(patches, resampler_layers)[image].unflatten(-1, (side, side))
    num_latents = len(latent_words)
    mass = latent_words.mean(dim=0).tolist()
    return QuestionAttention(
        rule=model.attention.rule,
        layers=chosen,
        words=tuple(
            QuestionWord(
                word.text, word.start, word.end, len(found), mass[number], bool(found) and min(found) >= run.end
            )
            for number, (word, found) in enumerate(zip(words, positions, strict=True))
        ),
        latent_words=latent_words,
        latent_patches=latent_patches,
        grid=torch.einsum("lw,lyx->yxw", latent_words, latent_patches) / num_latents,
        base_grid=latent_patches.mean(dim=0),
    )


def prompt_batch(model: Stage, template: Template, conversation: Conversation, image_options: ImageOptions) -> Batch:
    """Read, render and collate the prompt of one conversation. Raises DataError where it cannot be read."""
    prompt = read_prompt(conversation, template, media_decoders(model.config, image_options))
    return collate_prompts([prompt], template, model.config.vision.image_size)


@torch.no_grad()
def prefill(model: Stage, batch: Batch) -> Tensor:
    """Run prompts, one segment per sequence, as generation does; return the logits [B, V] after each."""
    batch = batch.to(next(model.parameters()).device)
    ids = stack_ids(batch)
    lengths = (ids.modality_ids != Modality.PAD).sum(dim=1)
    return model.logits(batch.token_ids, ids, batch.media, positions=lengths - 1)
