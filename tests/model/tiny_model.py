"""A tiny model and batches for it."""

import torch

from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality

LATENTS, IMAGE_TOKEN, PAD_TOKEN = 4, 40, 39
VISION = VisionConfig(image_size=12, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
RESAMPLER = ResamplerConfig(num_latents=LATENTS, num_layers=2, num_heads=2, head_dim=8)
DECODER = DecoderConfig(
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    padded_vocab_size=45,
    vocab_size=40,
    num_added_tokens=2,
    rope=RopeConfig(),
)
CONFIG = ModelConfig(vision=VISION, resampler=RESAMPLER, decoder=DECODER)


def tiny(**decoder: object) -> ModelConfig:
    """CONFIG with some of the decoder's fields changed."""
    given = {name: getattr(DECODER, name) for name in DECODER.model_fields_set}  # without the head_dim that follows
    return CONFIG.model_copy(update={"decoder": DecoderConfig(**(given | decoder))})


def fine_tuning_batch(*, images: bool = True, supervised: bool = True) -> Batch:
    """Three sequences: image + question + answer, text only, image + longer answer; padded on the right."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for prompt, answer, has_image in ((6, 3, True), (8, 5, False), (5, 6, True)):
        length = prompt + answer
        tokens = torch.randint(0, 39, (length,), generator=generator).tolist()
        modality = [int(Modality.TEXT)] * prompt + [int(Modality.RESPONSE)] * answer
        targets = [IGNORE] * (prompt - 1) + tokens[prompt:] + [IGNORE]
        if has_image and images:
            tokens[2:2] = [IMAGE_TOKEN] * LATENTS
            modality[2:2] = [int(Modality.IMAGE)] * LATENTS
            targets[2:2] = [IGNORE] * LATENTS
        sequences.append((tokens, modality, [0] * len(tokens), list(range(len(tokens))), targets))
    padded_length = max(len(sequence[0]) for sequence in sequences) + 1
    fillers = (PAD_TOKEN, int(Modality.PAD), NO_SEGMENT, 0, IGNORE)
    columns = [
        torch.tensor([sequence[index] + [filler] * (padded_length - len(sequence[index])) for sequence in sequences])
        for index, filler in enumerate(fillers)
    ]
    if not supervised:
        columns[4] = torch.full_like(columns[4], IGNORE)
    pixels = torch.randn(2 if images else 0, 3, 12, 12, generator=generator)
    return Batch(*columns, {Modality.IMAGE: pixels})
