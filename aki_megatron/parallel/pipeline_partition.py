"""Partition of the decoder layers over pipeline stages, balanced by FLOPs.

Encoder, resampler and LM head cost time too, so the partition is uneven.
P patches of an image or time steps of a recording, W hidden size of its encoder, Q latents of it, D hidden size, V
vocabulary size, T positions of a sample. A
multiply-add counts as 2 FLOPs; norms, activations and embedding look-ups are left out. A backward pass costs two
forward passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from aki_megatron.config.cross_checks import stage_layers_problem
from aki_megatron.config.model import AudioConfig, DecoderConfig, ModelConfig, ResamplerConfig, VisionConfig
from aki_megatron.errors import ConfigError

FORWARD_AND_BACKWARD = 3
"""Cost of a forward and a backward pass, in forward passes."""


@dataclass(frozen=True)
class StageCosts:
    """FLOPs of one sample, forward and backward, of the parts of the model; any other unit of time serves as well."""

    input_embedder: float
    """Encoder, resampler, embedding: only on the first stage."""
    layer: float
    """One decoder layer."""
    lm_head: float
    """LM head and loss: only on the last stage."""

    def per_stage(self, stages: Sequence[range]) -> list[float]:
        """Return the cost of each stage of a partition."""
        costs = [self.layer * len(layers) for layers in stages]
        costs[0] += self.input_embedder
        costs[-1] += self.lm_head
        return costs


def vision_flops(config: VisionConfig) -> float:
    """FLOPs of the encoder's forward pass for one image.

    Patch embedding 2 P W 3 patch_size^2; per layer the four projections 8 P W^2, attention scores and their product
    with the values 4 P^2 W, MLP 4 P W intermediate_size. The pooling head is not computed.
    """
    patches, width = config.num_patches, config.hidden_size
    embedding = 2 * patches * width * 3 * config.patch_size**2
    return embedding + config.num_layers * _encoder_layer_flops(patches, width, config.intermediate_size)


def audio_flops(config: AudioConfig) -> float:
    """FLOPs of the encoder's forward pass for one recording: the convolutions 6 F M W + 6 P W^2, layers as for images.

    F frames, M mel bands.
    """
    steps, width = config.num_positions, config.hidden_size
    convolutions = 6 * config.num_frames * config.num_mel_bins * width + 6 * steps * width**2
    return convolutions + config.num_layers * _encoder_layer_flops(steps, width, config.intermediate_size)


def _encoder_layer_flops(length: int, width: int, intermediate_size: int) -> float:
    return 8 * length * width**2 + 4 * length**2 * width + 4 * length * width * intermediate_size


def resampler_flops(config: ResamplerConfig, encoder: VisionConfig | AudioConfig, decoder: DecoderConfig) -> float:
    """FLOPs of the resampler's forward pass for one item.

    Per layer, with I = num_heads x head_dim: queries and output 4 Q W I, keys and values of patches and latents
    4 (P + Q) W I, scores and their product with the values 4 Q (P + Q) I, MLP 4 Q W mlp_ratio W; at the end the
    projection 2 Q W D.
    """
    latents, width, inner = config.num_latents, encoder.hidden_size, config.num_heads * config.head_dim
    keys = (encoder.num_positions if isinstance(encoder, AudioConfig) else encoder.num_patches) + latents
    attention = 4 * latents * width * inner + 4 * keys * width * inner + 4 * latents * keys * inner
    mlp = 4 * latents * width * config.mlp_ratio * width
    return config.num_layers * (attention + mlp) + 2 * latents * width * decoder.hidden_size


def layer_flops(config: DecoderConfig, num_positions: float) -> float:
    """FLOPs of one decoder layer's forward pass for a sample of T = ``num_positions``.

    With A = num_heads x head_dim: fused query, key and value 2 T D (A + 2 num_kv_heads head_dim), output 2 T A D,
    SwiGLU 6 T D intermediate_size, scores and their product with the values under a causal mask 2 T^2 A (half of all
    pairs; what image positions see beyond that is little).
    """
    hidden, attention = config.hidden_size, config.attention_size
    qkv = 2 * num_positions * hidden * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    mlp = 6 * num_positions * hidden * config.intermediate_size
    return qkv + 2 * num_positions * attention * hidden + mlp + 2 * num_positions**2 * attention


def lm_head_flops(config: DecoderConfig, num_positions: float) -> float:
    """FLOPs of the LM head's forward pass for S supervised positions: 2 S D (padded_vocab_size + num_added_tokens)."""
    return 2 * num_positions * config.hidden_size * (config.padded_vocab_size + config.num_added_tokens)


def estimate_costs(
    model: ModelConfig, *, text_tokens: float, images: float = 1.0, recompute: bool = False
) -> StageCosts:
    """Estimate the costs of a sample of ``text_tokens`` (a mean will do) with ``images`` images of Q positions each.

    A model that takes audio is taken to get as many recordings. The frozen encoder runs forward only; everything else
    forward and backward, layers with ``recompute`` forward twice. Every text token counts as supervised, which is the
    most that the LM head can have to do.
    """
    decoder = model.decoder
    num_positions = text_tokens + images * model.max_media_positions
    media = vision_flops(model.vision) + FORWARD_AND_BACKWARD * resampler_flops(model.resampler, model.vision, decoder)
    if audio := model.audio:
        media += audio_flops(audio) + FORWARD_AND_BACKWARD * resampler_flops(audio.resampler, audio, decoder)
    return StageCosts(
        input_embedder=images * media,
        layer=(FORWARD_AND_BACKWARD + recompute) * layer_flops(decoder, num_positions),
        lm_head=FORWARD_AND_BACKWARD * lm_head_flops(decoder, text_tokens),
    )


def balance_layers(num_layers: int, num_stages: int, *, costs: StageCosts) -> list[range]:
    """Return the layers of each stage, at least one each, such that the costliest stage costs as little as possible.

    Of equally good partitions it is the one with the fewest layers on the first stage, then on the second, ...: earlier
    stages hold more micro-batches in flight. Raises ConfigError for more stages than layers.
    """
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(
            f"{num_layers} decoder layers cannot be partitioned into {num_stages} stages; "
            f"choose 1 to {num_layers} stages."
        )
    fixed = [0.0] * num_stages
    fixed[0] += costs.input_embedder
    fixed[-1] += costs.lm_head

    def capacities(limit: float) -> list[int]:
        """Return the most layers each stage can have within a cost."""
        return [sum(cost + count * costs.layer <= limit for count in range(1, num_layers + 1)) for cost in fixed]

    # the smallest limit is the cost of some stage, so binary search over these candidates finds it exactly
    candidates = sorted({cost + count * costs.layer for cost in fixed for count in range(1, num_layers + 1)})
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        most = capacities(candidates[middle])
        if min(most) >= 1 and sum(most) >= num_layers:
            high = middle
        else:
            low = middle + 1
    # fill from the last stage: earlier stages get the fewest layers they can
    counts: list[int] = []
    left = num_layers
    for stages_before, most_layers in reversed(list(enumerate(capacities(candidates[low])))):
        counts.insert(0, min(most_layers, left - stages_before))
        left -= counts[0]
    assert left == 0
    return _consecutive_ranges(counts)


def layers_of_stages(
    model: ModelConfig,
    *,
    num_stages: int,
    layers_per_stage: Sequence[int],
    text_tokens: float,
    images: float = 1.0,
    recompute: bool = False,
) -> list[range]:
    """Return the layers of each of the ``num_stages`` = pipeline x virtual_stages stages.

    ``layers_per_stage`` decides, or the estimated costs where it is empty. Raises ConfigError where it does not have
    one entry per stage, or another sum than the number of layers.
    """
    num_layers = model.decoder.num_layers
    if layers_per_stage:
        problem = stage_layers_problem(num_layers, stages=num_stages, layers_per_stage=layers_per_stage)
        if problem:
            raise ConfigError(problem)
        return _consecutive_ranges(layers_per_stage)
    costs = estimate_costs(model, text_tokens=text_tokens, images=images, recompute=recompute)
    return balance_layers(num_layers, num_stages, costs=costs)


def _consecutive_ranges(counts: Sequence[int]) -> list[range]:
    """Return ranges of the given lengths, one after another from 0."""
    ends = [sum(counts[: n + 1]) for n in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
