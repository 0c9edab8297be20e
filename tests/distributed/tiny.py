"""A tiny model, uneven batches, and a reference training loop that every engine must equal.

The micro-batches of a step are numbered over all data ranks, so that any number of ranks trains on the same samples.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.engine.ddp_stage import DDPStage
from aki_megatron.engine.optimizer import adamw, learning_rate
from aki_megatron.engine.pipeline import PipelineEngine
from aki_megatron.engine.zero_stage import ZeroStage
from aki_megatron.model.stage import Stage, build_model, build_stage
from aki_megatron.parallel.megatron import build_linears
from aki_megatron.parallel.pipeline_partition import layers_of_stages
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality, StepReport, stack_ids

NUM_LATENTS, IMAGE_SIZE, BATCH_SIZE = 3, 8, 2
VOCAB_SIZE, IMAGE_TOKEN = 33, 33
STEPS, MICRO_BATCHES = 5, 8
"""Steps compared, micro-batches per step over all data ranks."""
OPTIMIZER = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-5}
"""With a smaller eps a gradient that is zero but for rounding would move weights by the whole learning rate."""


def model_config(**decoder: Any) -> ModelConfig:
    """Odd sizes where splitting allows them: some parameters have fewer elements than there are ranks."""
    sizes = {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 4,
        "intermediate_size": 20,
        "padded_vocab_size": 40,
    }
    sizes |= {"vocab_size": VOCAB_SIZE, "num_added_tokens": 2, "rope": RopeConfig(rope_type="default")}
    return ModelConfig(
        vision=VisionConfig(
            image_size=IMAGE_SIZE, patch_size=4, hidden_size=12, num_layers=1, num_heads=2, intermediate_size=20
        ),
        resampler=ResamplerConfig(num_latents=NUM_LATENTS, num_layers=1, num_heads=2, head_dim=6, mlp_ratio=2),
        decoder=DecoderConfig(**sizes | decoder),
    )


MODEL, TIED_MODEL = model_config(), model_config(tie_word_embeddings=True, lm_head_bias=False)


@dataclass(frozen=True)
class Setting:
    """How the tiny model is parallelized and trained; the tensor and pipeline sizes are the topology's."""

    zero_stage: int = 3
    precision: str = "fp32"
    virtual_stages: int = 1
    layers_per_stage: tuple[int, ...] = ()
    recompute: bool = False
    tied: bool = False
    family: str = "phi3"
    rule: str = "mma"
    offload: bool = False
    zero_settings: tuple[tuple[str, Any], ...] = ()
    """Further names and values of DeepSpeed's zero_optimization."""
    deepspeed: tuple[tuple[str, Any], ...] = ()
    """Further names and values at the top of DeepSpeed's settings."""
    mask_check_interval: int = 100

    @property
    def model(self) -> ModelConfig:
        if self.family != "phi3":
            return model_config(family=self.family)
        return TIED_MODEL if self.tied else MODEL

    @property
    def max_grad_norm(self) -> float:
        """A norm that some steps exceed and some do not."""
        return 1.4 if self.tied else 10.0


def tiny_model(setting: Setting = Setting()) -> Stage:
    """The whole model in one process."""
    return build_model(setting.model, attention=AttentionConfig(rule=setting.rule))


def tiny_stages(topology: Topology, setting: Setting) -> list[Stage]:
    """This rank's stages."""
    layers = layers_of_stages(
        setting.model,
        num_stages=topology.pipeline * setting.virtual_stages,
        layers_per_stage=setting.layers_per_stage,
        text_tokens=16,
    )
    linears = build_linears(topology)
    return [
        build_stage(
            own, run, attention=AttentionConfig(rule=setting.rule), linears=linears, recompute=setting.recompute
        )
        for own, run in ((setting.model, run) for run in layers[topology.pipeline_rank :: topology.pipeline])
    ]


def shard_stage(stage: Stage, topology: Topology, setting: Setting) -> ZeroStage:
    """A stage under DeepSpeed."""
    zero_settings = dict(setting.zero_settings) | ({"offload_optimizer": {"device": "cpu"}} if setting.offload else {})
    return ZeroStage(
        stage,
        topology,
        adamw(stage, **OPTIMIZER, fused=setting.offload),
        zero_stage=setting.zero_stage,
        precision=setting.precision,
        deepspeed_config={**dict(setting.deepspeed), "zero_optimization": zero_settings},
    )


def tiny_engine(
    topology: Topology,
    setting: Setting = Setting(),
    *,
    init_weights: Callable[[Stage], Any] = lambda stage: None,
    **more: Any,
) -> PipelineEngine:
    sharded_stages: list[Any] = []
    for stage in tiny_stages(topology, setting):
        init_weights(stage)
        if setting.zero_stage == 0:
            sharded_stages.append(DDPStage(stage, topology, adamw(stage, **OPTIMIZER)))
        else:
            sharded_stages.append(shard_stage(stage, topology, setting))
    return PipelineEngine(
        sharded_stages,
        topology,
        num_microbatches=MICRO_BATCHES // topology.data,
        precision=setting.precision,
        max_grad_norm=setting.max_grad_norm,
        mask_check_interval=setting.mask_check_interval,
        **more,
    )


@dataclass(frozen=True)
class Trained:
    """What some optimizer steps left behind."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def _sample(draw: torch.Generator, *, image: bool, supervised: bool) -> tuple[list[int], list[int], list[int]]:
    """Token ids, modality ids and targets of one sample: an image or none, a prompt, a response."""

    def tokens(count: int) -> list[int]:
        return torch.randint(0, VOCAB_SIZE, (count,), generator=draw).tolist()

    prompt, response = (int(torch.randint(2, 6, (), generator=draw)) for _ in range(2))
    images = NUM_LATENTS if image else 0
    ids = [*tokens(1), *[IMAGE_TOKEN] * images, *tokens(prompt + response)]
    modality = [Modality.TEXT, *[Modality.IMAGE] * images]
    modality += [Modality.TEXT] * prompt + [Modality.RESPONSE] * response
    targets = [IGNORE] * len(ids)
    if supervised:
        first = len(ids) - response
        targets[first - 1 : -1] = ids[first:]
    return ids, modality, targets


def _interleaved_sample(draw: torch.Generator) -> tuple[list[int], list[int], list[int]]:
    """Token ids, modality ids and targets of a sample of two turns with 0 to 4 images between the texts of prompts."""
    ids: list[int] = []
    modality: list[int] = []
    for most in (3, 1):
        for _ in range(int(torch.randint(0, most + 1, (), generator=draw))):
            count = int(torch.randint(0, 3, (), generator=draw))  # 0: two images next to each other
            ids += torch.randint(0, VOCAB_SIZE, (count,), generator=draw).tolist() + [IMAGE_TOKEN] * NUM_LATENTS
            modality += [Modality.TEXT] * count + [Modality.IMAGE] * NUM_LATENTS
        ids += torch.randint(0, VOCAB_SIZE, (4,), generator=draw).tolist()
        modality += [Modality.TEXT] * 2 + [Modality.RESPONSE] * 2
    targets = [token if kind == Modality.RESPONSE else IGNORE for token, kind in zip(ids, modality, strict=True)]
    return ids, modality, [*targets[1:], IGNORE]


def draw_batch(step: int, number: int) -> Batch:
    """Micro-batch ``number`` of step ``step``: sequences differ in length and supervision, batches in length.

    Of every four micro-batches the second has no image, the third of odd steps no supervised token, and in the fourth
    sequences are packed: two samples, each a segment with its own positions, of two turns with 0 to 4 images.
    """
    draw = torch.Generator().manual_seed(1000 * step + number)
    kind = number % 4
    supervised = not (kind == 2 and step % 2)
    sequences = [
        [_interleaved_sample(draw), _interleaved_sample(draw)]
        if kind == 3
        else [_sample(draw, image=kind != 1, supervised=supervised)]
        for _ in range(BATCH_SIZE)
    ]
    length = max(sum(len(ids) for ids, _, _ in samples) for samples in sequences)
    token_ids = torch.zeros(BATCH_SIZE, length, dtype=torch.int64)
    modality_ids = torch.full((BATCH_SIZE, length), Modality.PAD, dtype=torch.int8)
    segment_ids = torch.full((BATCH_SIZE, length), NO_SEGMENT, dtype=torch.int32)
    position_ids = torch.zeros(BATCH_SIZE, length, dtype=torch.int32)
    targets = torch.full((BATCH_SIZE, length), IGNORE)
    for row, samples in enumerate(sequences):
        start = 0
        for segment, (ids, modality, wanted) in enumerate(samples):
            here = slice(start, start + len(ids))
            token_ids[row, here], modality_ids[row, here] = torch.tensor(ids), torch.tensor(modality, dtype=torch.int8)
            segment_ids[row, here], targets[row, here] = segment, torch.tensor(wanted)
            position_ids[row, here] = torch.arange(len(ids), dtype=torch.int32)
            start += len(ids)
    images = int((modality_ids == Modality.IMAGE).sum()) // NUM_LATENTS
    pixels = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=draw)
    return Batch(token_ids, modality_ids, segment_ids, position_ids, targets, {Modality.IMAGE: pixels})


def rank_batches(step: int, rank: int, ranks: int) -> list[Batch]:
    """The micro-batches of one data rank."""
    return [draw_batch(step, number) for number in range(rank, MICRO_BATCHES, ranks)]


def own_batches(step: int, topology: Topology) -> list[Batch]:
    """What a rank hands to its engine: its micro-batches if it reads data."""
    return rank_batches(step, topology.data_rank, topology.data) if topology.reads_data else []


def rate(step: int) -> float:
    return learning_rate(step, lr=1e-2, min_lr=1e-3, warmup_steps=2, steps=STEPS)


def take_steps(engine: PipelineEngine, topology: Topology, steps: Iterable[int]) -> list[StepReport]:
    return [engine.train_step(own_batches(step, topology), rate(step)) for step in steps]


def outcome(engine: PipelineEngine, reports: list[StepReport]) -> Trained:
    """The reports and this rank's weights."""
    weights = {name: weight.clone() for name, weight in engine.named_weights()}
    return Trained([report.loss for report in reports], [report.grad_norm for report in reports], weights)


def together(results: Sequence[Trained]) -> Trained:
    """What all ranks hold: every rank reports the same, and holds the same of what others hold too."""
    weights: dict[str, Tensor] = {}
    for result in results:
        assert (result.losses, result.norms) == (results[0].losses, results[0].norms)
        for name, weight in result.weights.items():
            assert torch.equal(weights.setdefault(name, weight), weight), f"copies of {name} differ"
    return Trained(results[0].losses, results[0].norms, weights)


def reference_training(steps: Iterable[int] = range(STEPS), setting: Setting = Setting()) -> Trained:
    """Train in one process, without engine and DeepSpeed: the reference.

    In bf16 a copy of the model runs forward and backward; weights and gradients are kept in fp32.
    """
    model = tiny_model(setting)
    optimizer = adamw(model, **OPTIMIZER)
    losses, norms = [], []
    for step in steps:
        batches = rank_batches(step, 0, 1)
        supervised = sum(batch.supervised_tokens for batch in batches)
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in batches:
            replica = model if setting.precision == "fp32" else _bf16_copy(model)
            dtype = next(replica.parameters()).dtype
            media = {modality: items.to(dtype) for modality, items in batch.media.items()}
            loss = replica(batch.token_ids, stack_ids(batch), media) / supervised
            loss.backward()
            losses[-1] += loss.item()
            if replica is not model:
                _add_gradients(model, replica)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), setting.max_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    return Trained(losses, norms, {name: weight.detach().clone() for name, weight in model.named_parameters()})


def _bf16_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).bfloat16()
    copied.zero_grad()
    return copied


def _add_gradients(model: nn.Module, replica: nn.Module) -> None:
    for master, copied in zip(model.parameters(), replica.parameters(), strict=True):
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
