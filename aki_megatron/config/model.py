"""Sizes of the three parts of the model: SigLIP encoder, Perceiver resampler, decoder of one of four families."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from aki_megatron.config.section import Floats, Section
from aki_megatron.errors import ConfigError


def _divides(part: str, whole: str, size: int, pieces: str, count: int) -> None:
    if size % count:
        raise ConfigError(
            f"{part}.{whole}={size} cannot be divided into {part}.{pieces}={count}; "
            f"choose {pieces} from {[n for n in range(1, size + 1) if size % n == 0]}."
        )


class VisionConfig(Section):
    """SigLIP vision transformer; the defaults are google/siglip-so400m-patch14-384."""

    image_size: PositiveInt = 384
    """Side in pixels of the square that every picture is resized to."""
    patch_size: PositiveInt = 14
    """Side of a patch in pixels; a rest of the image smaller than a patch is not seen."""
    hidden_size: PositiveInt = 1152
    """Features of a patch between layers."""
    num_layers: PositiveInt = 27
    num_heads: PositiveInt = 16
    intermediate_size: PositiveInt = 4304
    """Features inside the feed-forward part of a layer."""
    norm_eps: PositiveFloat = 1e-6
    pooling_head: bool = True
    """Hold the weights of SigLIP's attention pooling. They take no part in AKI's forward pass;
    they are kept so that a converted release is complete."""

    @model_validator(mode="after")
    def _relations(self) -> "VisionConfig":
        _divides("model.vision", "hidden_size", self.hidden_size, "num_heads", self.num_heads)
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"model.vision.image_size={self.image_size} holds no patch of patch_size={self.patch_size}; "
                "choose image_size >= patch_size."
            )
        return self

    @property
    def patches(self) -> int:
        """Features per image: whole patches only, as a convolution without padding cuts them."""
        return (self.image_size // self.patch_size) ** 2


class ResamplerConfig(Section):
    """Perceiver resampler of AKI: 144 latents, six layers of cross-attention and feed-forward."""

    num_latents: PositiveInt = 144
    """Places that one image takes in the decoder's sequence."""
    num_layers: PositiveInt = 6
    num_heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    """Features of one attention head."""
    mlp_ratio: PositiveInt = 4
    """Features inside the feed-forward part, as a multiple of model.vision.hidden_size."""
    norm_eps: PositiveFloat = 1e-5


class RopeConfig(Section):
    """Rotary position embedding. ``longrope`` (Phi-3) divides each frequency by a factor: the short ones up to
    ``original_max_position_embeddings``, the long ones beyond, and scales cos and sin by
    sqrt(1 + ln(max / original) / ln(original)). ``llama3`` (LLaMA 3.1 and later) divides slow frequencies by
    ``factor``, keeps fast ones, and blends those between."""

    rope_type: Literal["default", "longrope", "llama3"] = "default"
    theta: PositiveFloat = 10000.0
    max_position_embeddings: PositiveInt = 4096
    original_max_position_embeddings: PositiveInt = 4096
    short_factor: Floats = ()
    """One factor per frequency (half the head width); longrope only."""
    long_factor: Floats = ()
    factor: PositiveFloat = 1.0
    """How much slower a slow frequency gets; llama3 only."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: waves longer than original_max_position_embeddings / low_freq_factor positions are slow."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: waves shorter than original_max_position_embeddings / high_freq_factor positions are fast."""

    @model_validator(mode="after")
    def _relations(self) -> "RopeConfig":
        if self.rope_type != "longrope" and (self.short_factor or self.long_factor):
            raise ConfigError(
                f"model.decoder.rope has short_factor or long_factor but rope_type={self.rope_type}, which uses none; "
                "write rope_type: longrope or leave the factors out."
            )
        if self.rope_type != "llama3" and self.factor != 1.0:
            raise ConfigError(
                f"model.decoder.rope.factor={self.factor} but rope_type={self.rope_type}, which uses none; "
                "write rope_type: llama3 or leave the factor out."
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"model.decoder.rope.low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor} for rope_type=llama3."
            )
        if (
            self.rope_type == "longrope"
            and not 1 < self.original_max_position_embeddings <= self.max_position_embeddings
        ):
            raise ConfigError(
                f"model.decoder.rope.original_max_position_embeddings={self.original_max_position_embeddings} must lie in "
                f"[2, max_position_embeddings={self.max_position_embeddings}] for rope_type=longrope."
            )
        return self


# fmt: off
PHI35_MINI_ROPE = RopeConfig(
    rope_type="longrope",
    theta=10000.0,
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    short_factor=(
        1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, 1.0499999523162842, 1.0499999523162842,
        1.0499999523162842, 1.0499999523162842, 1.0499999523162842, 1.0699999332427979, 1.0999999046325684,
        1.1099998950958252, 1.1599998474121094, 1.1599998474121094, 1.1699998378753662, 1.2899998426437378,
        1.339999794960022, 1.679999828338623, 1.7899998426437378, 1.8199998140335083, 1.8499997854232788,
        1.8799997568130493, 1.9099997282028198, 1.9399996995925903, 1.9899996519088745, 2.0199997425079346,
        2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346,
        2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914,
        2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0799996852874756,
        2.0899996757507324, 2.189999580383301, 2.2199995517730713, 2.5899994373321533, 2.729999542236328,
        2.749999523162842, 2.8399994373321533,
    ),
    long_factor=(
        1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
        1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
        4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137,
        17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
        32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156,
        50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
        62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457,
        63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
        64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336,
        64.51000213623047, 64.52999877929688, 64.83999633789062,
    ),
)
# fmt: on
"""The published values of microsoft/Phi-3.5-mini-instruct (config.json, rope_scaling): 48 factors for head width 96."""


@dataclass(frozen=True)
class FamilyTraits:
    """What tells one family of decoders from another: all are RMSNorm, rotary positions, SwiGLU."""

    qkv_bias: bool
    """Queries, keys and values have biases; the attention's output has none."""
    qk_norm: bool
    """Queries and keys go through an RMSNorm over the head's width before they are turned."""


FAMILIES: dict[str, FamilyTraits] = {
    "phi3": FamilyTraits(qkv_bias=False, qk_norm=False),
    "llama": FamilyTraits(qkv_bias=False, qk_norm=False),
    "qwen2": FamilyTraits(qkv_bias=True, qk_norm=False),
    "qwen3": FamilyTraits(qkv_bias=False, qk_norm=True),
}
"""Families by the name that transformers gives them (model_type)."""


class DecoderConfig(Section):
    """Decoder of one of FAMILIES; the defaults are microsoft/Phi-3.5-mini-instruct as AKI-4B holds it.

    A decoder of another head width needs a ``rope`` of its own: the default holds 48 factors for head width 96.
    """

    family: Literal["phi3", "llama", "qwen2", "qwen3"] = "phi3"
    """Decides biases and norms of the attention, and the names of the tensors in Hugging Face folders."""
    hidden_size: PositiveInt = 3072
    """Features of a token between layers; hidden_size / num_heads is the width of an attention head."""
    num_layers: PositiveInt = 32
    num_heads: PositiveInt = 32
    """Query heads."""
    num_kv_heads: PositiveInt = 32
    """Key and value heads; fewer than heads is grouped-query attention."""
    intermediate_size: PositiveInt = 8192
    """Features inside the feed-forward part (SwiGLU) of a layer."""
    norm_eps: PositiveFloat = 1e-5
    padded_vocab_size: PositiveInt = 32064
    """Rows of the embedding and head tables, rows that no token uses included."""
    vocab_size: PositiveInt = 32012
    """Tokens that the tables hold: ids below it read the tables."""
    num_added_tokens: int = Field(default=2, ge=0)
    """Tokens with rows of their own beside the tables (AKI: <image>, <|endofchunk|>):
    ids vocab_size ... vocab_size + num_added_tokens - 1."""
    lm_head_bias: bool = True
    """Whether the output head adds a bias, as AKI's does and Phi-3's does not."""
    tie_word_embeddings: bool = False
    """Whether the output head is the embedding table."""
    rope: RopeConfig = PHI35_MINI_ROPE

    @model_validator(mode="after")
    def _relations(self) -> "DecoderConfig":
        _divides("model.decoder", "hidden_size", self.hidden_size, "num_heads", self.num_heads)
        _divides("model.decoder", "num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        if self.head_dim % 2:
            raise ConfigError(
                f"model.decoder: hidden_size / num_heads = {self.head_dim} must be even, rotary embedding turns pairs."
            )
        if self.total_vocab_size > self.padded_vocab_size:
            raise ConfigError(
                f"model.decoder: vocab_size + num_added_tokens = {self.total_vocab_size} exceeds padded_vocab_size={self.padded_vocab_size}; "
                "choose padded_vocab_size at least as large."
            )
        for name in ("short_factor", "long_factor") if self.rope.rope_type == "longrope" else ():
            got, needed = len(getattr(self.rope, name)), self.head_dim // 2
            if got != needed:
                raise ConfigError(
                    f"model.decoder.rope.{name} has {got} values, a head width of {self.head_dim} needs {needed}; "
                    "give that many, or write rope: {rope_type: default}."
                )
        return self

    @property
    def traits(self) -> FamilyTraits:
        """What its family has."""
        return FAMILIES[self.family]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def total_vocab_size(self) -> int:
        """Tokens the model can predict."""
        return self.vocab_size + self.num_added_tokens


class ModelConfig(Section):
    """A whole model; the default sizes are AKI-4B."""

    vision: VisionConfig = VisionConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    decoder: DecoderConfig = DecoderConfig()
