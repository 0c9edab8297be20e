"""A tiny run of a rule: configuration, samples with images, turns and packing, batches, and position ids by loops."""

from pathlib import Path

import torch
from attention_samples import IMAGE, RESPONSE, TEXT

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.data.collate import collate
from aki_megatron.types import IGNORE, Batch, DecodedImage, Sample, image_items

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"
LATENTS, IMAGE_SIZE, IMAGE_TOKEN, VOCAB_SIZE = 9, 8, 40, 40

SIZES = {
    "vision.image_size": IMAGE_SIZE,
    "vision.patch_size": 4,
    "vision.hidden_size": 16,
    "vision.num_layers": 1,
    "vision.num_heads": 2,
    "vision.intermediate_size": 24,
    "resampler.num_latents": LATENTS,
    "resampler.num_layers": 1,
    "resampler.num_heads": 2,
    "resampler.head_dim": 8,
    "decoder.hidden_size": 32,
    "decoder.num_layers": 2,
    "decoder.num_heads": 4,
    "decoder.num_kv_heads": 2,
    "decoder.intermediate_size": 48,
    "decoder.padded_vocab_size": 48,
    "decoder.vocab_size": VOCAB_SIZE,
    "decoder.num_added_tokens": 2,
}

RUNS = {
    "causal": ("--attention.rule", "causal"),
    "mma": ("--attention.rule", "mma"),
    "half of mma": ("--attention.rule", "mma", "--attention.visible_fraction", "0.5"),
    "random half of mma": (
        *("--attention.rule", "mma", "--attention.visible_fraction", "0.5"),
        *("--attention.selection", "random", "--attention.seed", "3"),
    ),
    "mma_general": ("--attention.rule", "mma_general"),
    "mixed": ("--attention.rule", "mixed"),
    "cca": ("--attention.rule", "cca"),
}
"""Every rule, and mma with its options, as flags."""


def config_of(name: str, *flags: str) -> RunConfig:
    """The run of a rule of RUNS."""
    sizes = [word for key, size in SIZES.items() for word in (f"--model.{key}", str(size))]
    batch = ("--train.global_batch_size", "4", "--train.micro_batch_size", "2", "--parallel.zero_stage", "0")
    # a smaller eps would let a gradient that is zero but for rounding move a weight by the whole learning rate
    argv = [*sizes, *RUNS[name], *batch, "--init.weights", "null", "--optimizer.eps", "1e-5", *flags]
    return load_run(argv, default_config=SFT, prog="sft.py", description="")


def sample_of(seed: int, *runs: tuple[int, int]) -> Sample:
    """A sample of (modality, count) runs with random tokens; RESPONSE tokens are supervised; one image at most."""
    generator = torch.Generator().manual_seed(seed)
    modality = [kind for kind, count in runs for _ in range(count)]
    tokens = torch.randint(0, VOCAB_SIZE, (len(modality),), generator=generator).tolist()
    tokens = [IMAGE_TOKEN if kind == IMAGE else token for token, kind in zip(tokens, modality, strict=True)]
    targets = [IGNORE] * len(tokens)
    for i in range(len(tokens) - 1):
        if modality[i + 1] == RESPONSE:
            targets[i] = tokens[i + 1]
    rgb = torch.randint(0, 256, (IMAGE_SIZE * IMAGE_SIZE * 3,), generator=generator).to(torch.uint8)
    image = DecodedImage(rgb.numpy().tobytes(), IMAGE_SIZE) if IMAGE in modality else None
    return Sample(f"sample {seed}", tokens, modality, targets, image_items(image))


def batch_of_sequences(*sequences: list[Sample]) -> Batch:
    return collate(sequences, pad_id=0, image_size=IMAGE_SIZE)


def training_batch(seed: int) -> Batch:
    """Two sequences: a packed one, and a longer conversation of two turns."""
    one_turn = sample_of(seed, (TEXT, 2), (IMAGE, LATENTS), (TEXT, 5), (RESPONSE, 3))
    text = sample_of(seed + 1, (TEXT, 4), (RESPONSE, 2))
    two_turns = ((TEXT, 1), (IMAGE, LATENTS), (TEXT, 7), (RESPONSE, 4), (TEXT, 5), (RESPONSE, 3))
    return batch_of_sequences([one_turn, text, one_turn], [sample_of(seed + 2, *two_turns)])


def prompts(seed: int) -> Batch:
    """Prompts of different lengths; the last ends with its image."""
    return batch_of_sequences(
        [sample_of(seed, (TEXT, 2), (IMAGE, LATENTS), (TEXT, 6))],
        [sample_of(seed + 1, (TEXT, 3))],
        [sample_of(seed + 2, (TEXT, 4), (IMAGE, LATENTS))],
    )


def concentric_by_loops(modality_ids: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Position ids of rule cca, one token after the other: rings of 3 x 3 grids, ids restart in every segment."""
    ring_of_cell = [0, 0, 0, 0, 1, 0, 0, 0, 0]
    positions = torch.zeros(modality_ids.shape, dtype=torch.int32)
    for b in range(len(positions)):
        next_position, cell, segment = 0, 0, -1
        for t in range(positions.shape[1]):
            if segment_ids[b, t] < 0:
                continue
            if segment_ids[b, t] != segment:
                next_position, cell, segment = 0, 0, int(segment_ids[b, t])
            if modality_ids[b, t] != IMAGE:
                positions[b, t] = next_position
                next_position += 1
                continue
            positions[b, t] = next_position + ring_of_cell[cell]
            cell = (cell + 1) % LATENTS
            next_position += 2 * (cell == 0)
    return positions
