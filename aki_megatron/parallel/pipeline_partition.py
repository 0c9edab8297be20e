"""Which decoder layers stand on which pipeline stage: uneven, because encoder, resampler and head cost time too. Pure.

P patches, W encoder width, Q latents per image, D decoder width, T places of a sample. A multiplication with its
addition counts as 2 FLOPs; norms, activations and embedding look-ups are left out. A backward pass costs two forwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from aki_megatron.config.cross_checks import stage_layers_problem
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, VisionConfig
from aki_megatron.errors import ConfigError

TRAINED = 3
"""Forward and backward in forwards."""


@dataclass(frozen=True)
class StageCosts:
    """FLOPs of one sample, forward and backward; any other unit of time serves as well."""

    front: float
    """Encoder, resampler, embedding: what only the first stage does."""
    layer: float
    """One decoder layer."""
    head: float
    """Output head and loss: what only the last stage does."""

    def of(self, stages: Sequence[range]) -> list[float]:
        """Cost of each stage of a cut."""
        costs = [self.layer * len(stage) for stage in stages]
        costs[0] += self.front
        costs[-1] += self.head
        return costs


def vision_flops(config: VisionConfig) -> float:
    """Forward pass of the encoder for one image.

    Patch embedding 2 P W 3 patch^2; per layer the four projections 8 P W^2, scores and mix 4 P^2 W, feed-forward
    4 P W mlp. The pooling head takes no part.
    """
    patches, width = config.patches, config.hidden_size
    embedding = 2 * patches * width * 3 * config.patch_size**2
    layer = 8 * patches * width**2 + 4 * patches**2 * width + 4 * patches * width * config.intermediate_size
    return embedding + config.num_layers * layer


def resampler_flops(config: ResamplerConfig, vision: VisionConfig, decoder: DecoderConfig) -> float:
    """Forward pass of the resampler for one image.

    Per layer, with I = heads x head width: queries and output 4 Q W I, keys and values of patches and latents
    4 (P + Q) W I, scores and mix 4 Q (P + Q) I, feed-forward 4 Q W ratio W; at the end the projection 2 Q W D.
    """
    latents, width, inner = config.num_latents, vision.hidden_size, config.num_heads * config.head_dim
    seen = vision.patches + latents
    attention = 4 * latents * width * inner + 4 * seen * width * inner + 4 * latents * seen * inner
    feed_forward = 4 * latents * width * config.mlp_ratio * width
    return config.num_layers * (attention + feed_forward) + 2 * latents * width * decoder.hidden_size


def layer_flops(config: DecoderConfig, places: float) -> float:
    """Forward pass of one decoder layer for a sample of T = ``places``.

    Fused query, key and value 2 T D (heads + 2 num_kv_heads) head_dim, output 2 T D^2, SwiGLU 6 T D mlp, scores and mix
    of a causal mask 2 T^2 D (half of all pairs; what image places see ahead of themselves is little beside it).
    """
    width = config.hidden_size
    qkv = 2 * places * width * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return qkv + 2 * places * width**2 + 6 * places * width * config.intermediate_size + 2 * places**2 * width


def head_flops(config: DecoderConfig, places: float) -> float:
    """Forward pass of the output head for ``places`` supervised places: 2 places D (padded_vocab_size + num_added_tokens)."""
    return 2 * places * config.hidden_size * (config.padded_vocab_size + config.num_added_tokens)


def costs_of(model: ModelConfig, *, text_tokens: float, images: float = 1.0, recompute: bool = False) -> StageCosts:
    """Costs of a sample of ``text_tokens`` (a mean will do) with ``images`` images of Q places each.

    The frozen encoder runs forward only; everything else forward and backward, layers with ``recompute`` forward twice.
    Every text token is taken to be supervised: the most that the head can have to do.
    """
    decoder = model.decoder
    places = text_tokens + images * model.resampler.num_latents
    image = vision_flops(model.vision) + TRAINED * resampler_flops(model.resampler, model.vision, decoder)
    return StageCosts(
        front=images * image,
        layer=(TRAINED + recompute) * layer_flops(decoder, places),
        head=TRAINED * head_flops(decoder, text_tokens),
    )


def cut(layers: int, stages: int, *, costs: StageCosts) -> list[range]:
    """Layers of each stage, in order: at least one each, such that the costliest stage costs as little as possible.

    Of cuts that are equally good the one with the fewest layers on the first stage, then on the second, ...: earlier
    stages hold more micro-batches in flight. Errors: ConfigError for more stages than layers.
    """
    if not 1 <= stages <= layers:
        raise ConfigError(f"{layers} decoder layers cannot be cut into {stages} stages; choose 1 to {layers} stages.")
    fixed = [0.0] * stages
    fixed[0] += costs.front
    fixed[-1] += costs.head

    def capacities(limit: float) -> list[int]:
        """Most layers of each stage within a cost."""
        return [sum(cost + count * costs.layer <= limit for count in range(1, layers + 1)) for cost in fixed]

    # the best limit is the cost of some stage, so it is found exactly, by halving the sorted candidates
    candidates = sorted({cost + count * costs.layer for cost in fixed for count in range(1, layers + 1)})
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        most = capacities(candidates[middle])
        if min(most) >= 1 and sum(most) >= layers:
            high = middle
        else:
            low = middle + 1
    # filled from the end: what is left for the earlier stages is the least they can have
    counts: list[int] = []
    left = layers
    for before, most_layers in reversed(list(enumerate(capacities(candidates[low])))):
        counts.insert(0, min(most_layers, left - before))
        left -= counts[0]
    assert left == 0
    return consecutive(counts)


def consecutive(counts: Sequence[int]) -> list[range]:
    """Runs of the given lengths, one after another, from layer 0."""
    ends = [sum(counts[: n + 1]) for n in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def stage_layers(
    model: ModelConfig,
    *,
    stages: int,
    layers_per_stage: Sequence[int],
    text_tokens: float,
    images: float = 1.0,
    recompute: bool = False,
) -> list[range]:
    """Layers of each of the ``stages`` = pipeline x virtual_stages stages: as given, or cut by cost where nothing is given.

    Errors: ConfigError where ``layers_per_stage`` does not have one entry per stage, or another sum than the layers.
    """
    if layers_per_stage:
        problem = stage_layers_problem(model.decoder.num_layers, stages=stages, layers_per_stage=layers_per_stage)
        if problem:
            raise ConfigError(problem)
        return consecutive(layers_per_stage)
    costs = costs_of(model, text_tokens=text_tokens, images=images, recompute=recompute)
    return cut(model.decoder.num_layers, stages, costs=costs)
