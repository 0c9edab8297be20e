"""A tiny model, uneven batches, and the plain training loop that every engine must equal.

The micro-batches of a step are numbered over all data ranks, so that any number of ranks trains on the same samples.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.engine.optimizer import adamw, learning_rate
from aki_megatron.engine.zero import ZeroEngine
from aki_megatron.flow import IGNORE, NO_SEGMENT, Batch, Modality, StepReport, stack_ids
from aki_megatron.model.stage import build_model
from aki_megatron.parallel.topology import Topology

TOKENS, QUERIES, IMAGE_SIZE = 12, 3, 8
BASE_TOKENS, IMAGE_TOKEN = 33, 33
STEPS, MICROBATCHES, CLIP_NORM = 5, 4, 20.0
"""Steps compared, micro-batches per step over all ranks, and a norm that some steps exceed and some do not."""
OPTIMIZER = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-5}
"""With a smaller eps a gradient that is zero but for rounding would move weights by the whole learning rate."""

MODEL = ModelConfig(
    vision=VisionConfig(image_size=IMAGE_SIZE, patch_size=4, width=12, layers=1, heads=2, mlp_width=20),
    resampler=ResamplerConfig(latents=QUERIES, layers=1, heads=2, head_width=6, mlp_ratio=2),
    decoder=DecoderConfig(
        width=24,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp_width=20,
        vocab_rows=37,
        base_tokens=BASE_TOKENS,
        extra_tokens=2,
        rope=RopeConfig(kind="default", short_factor=(), long_factor=()),
    ),
)
"""Odd sizes: some parameters have fewer elements than there are ranks, few have a multiple."""


def tiny_model() -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return build_model(MODEL, rule="mma")


def tiny_engine(topology: Topology, zero_stage: int, precision: str = "fp32", **zero_settings: int) -> ZeroEngine:
    model = tiny_model()
    return ZeroEngine(
        model,
        topology,
        adamw(model, **OPTIMIZER),
        zero_stage=zero_stage,
        precision=precision,
        clip_norm=CLIP_NORM,
        deepspeed_config={"zero_optimization": zero_settings},
    )


@dataclass(frozen=True)
class Trained:
    """What some optimizer steps left behind."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def draw_batch(step: int, number: int) -> Batch:
    """Micro-batch ``number`` of step ``step``: rows of different lengths and supervision.

    Number 1 of every step has no image, number 2 of odd steps no supervised token.
    """
    draw = torch.Generator().manual_seed(1000 * step + number)
    rows, with_images = 2, number != 1
    token_ids = torch.randint(0, BASE_TOKENS, (rows, TOKENS), generator=draw)
    modality_ids = torch.full((rows, TOKENS), Modality.TEXT, dtype=torch.int8)
    segment_ids = torch.zeros(rows, TOKENS, dtype=torch.int32)
    targets = torch.full((rows, TOKENS), IGNORE)
    for row in range(rows):
        length = TOKENS - int(torch.randint(0, 3, (), generator=draw))
        response = length - 1 - int(torch.randint(0, 2 + number, (), generator=draw))
        if with_images:
            modality_ids[row, 1 : 1 + QUERIES] = Modality.IMAGE
            token_ids[row, 1 : 1 + QUERIES] = IMAGE_TOKEN
        modality_ids[row, response:length] = Modality.RESPONSE
        modality_ids[row, length:] = Modality.PAD
        segment_ids[row, length:] = NO_SEGMENT
        if not (number == 2 and step % 2):
            targets[row, response - 1 : length - 1] = token_ids[row, response:length]
    position_ids = torch.arange(TOKENS, dtype=torch.int32).repeat(rows, 1)
    pixels = torch.randn(rows if with_images else 0, 3, IMAGE_SIZE, IMAGE_SIZE, generator=draw)
    return Batch(token_ids, modality_ids, segment_ids, position_ids, targets, pixels)


def share(step: int, rank: int, ranks: int) -> list[Batch]:
    """The micro-batches of one rank."""
    return [draw_batch(step, number) for number in range(rank, MICROBATCHES, ranks)]


def rate(step: int) -> float:
    return learning_rate(step, lr=1e-2, min_lr=1e-3, warmup_steps=2, steps=STEPS)


def take_steps(engine: ZeroEngine, topology: Topology, steps: Iterable[int]) -> list[StepReport]:
    return [engine.train_step(share(step, topology.data_rank, topology.data), rate(step)) for step in steps]


def outcome(engine: ZeroEngine, reports: list[StepReport]) -> Trained:
    weights = {name: weight.clone() for name, weight in engine.weights()}
    return Trained([report.loss for report in reports], [report.grad_norm for report in reports], weights)


def train_plainly(steps: Iterable[int] = range(STEPS), precision: str = "fp32") -> Trained:
    """One process, no engine, no DeepSpeed: the plain twin.

    In bf16 a copy of the model runs forward and backward; weights and gradients are kept in fp32.
    """
    model = tiny_model()
    optimizer = adamw(model, **OPTIMIZER)
    losses, norms = [], []
    for step in steps:
        batches = share(step, 0, 1)
        supervised = sum(batch.supervised_tokens for batch in batches)
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in batches:
            runner = model if precision == "fp32" else _bf16_copy(model)
            loss = (
                runner(batch.token_ids, stack_ids(batch), batch.pixels.to(next(runner.parameters()).dtype)) / supervised
            )
            loss.backward()
            losses[-1] += loss.item()
            if runner is not model:
                _add_gradients(model, runner)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    return Trained(losses, norms, {name: weight.detach().clone() for name, weight in model.named_parameters()})


def _bf16_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).bfloat16()
    copied.zero_grad()
    return copied


def _add_gradients(model: nn.Module, runner: nn.Module) -> None:
    for master, copied in zip(model.parameters(), runner.parameters(), strict=True):
        if master.requires_grad:
            master.grad = copied.grad.float() + (0 if master.grad is None else master.grad)


def difference(got: Trained, want: Trained) -> float:
    """Largest difference of any weight, any loss, and any norm relative to it."""
    assert got.weights.keys() == want.weights.keys()
    weights = [float((got.weights[name] - want.weights[name]).abs().max()) for name in want.weights]
    losses = [abs(one - other) for one, other in zip(got.losses, want.losses, strict=True)]
    norms = [abs(one / other - 1) for one, other in zip(got.norms, want.norms, strict=True)]
    print(f"largest differences: weights {max(weights):.1e}, losses {max(losses):.1e}, norms {max(norms):.1e}")
    return max(weights + losses + norms)
