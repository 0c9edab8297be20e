"""Sizes of the parts of the model: SigLIP encoder, Perceiver resampler, decoder; Whisper encoder where it hears."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, field_serializer, model_validator

from aki_megatron.config.section import AtMost, Floats, OneOf, PositiveInt, Section, no_stand_in
from aki_megatron.errors import ConfigError
from aki_megatron.families.base import FamilyTraits
from aki_megatron.families.registry import DEFAULT_FAMILY, DEFAULT_ROPE, FAMILIES

Size = Annotated[PositiveInt, AtMost(2**24)]
Layers = Annotated[PositiveInt, AtMost(4096)]


def _check_divisible(section: str, key: str, size: int, by: str, count: int) -> None:
    if size % count:
        raise ConfigError(
            f"{section}.{key}={size} cannot be divided into {section}.{by}={count}; "
            f"choose {by} from {[n for n in range(1, size + 1) if size % n == 0]}."
        )


class VisionConfig(Section):
    """SigLIP vision transformer; the defaults are google/siglip-so400m-patch14-384."""

    image_size: Size = 384
    """Side, in pixels, of the square that every image is resized to."""
    patch_size: Size = 14
    """Side of a square patch, in pixels; pixels beyond the last whole patch are ignored."""
    hidden_size: Size = 1152
    """Hidden size of the transformer."""
    num_layers: Layers = 27
    """Number of transformer layers."""
    num_heads: Size = 16
    """Number of attention heads."""
    intermediate_size: Size = 4304
    """Hidden size of the feed-forward block."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of the layer norms."""
    pooling_head: bool = True
    """Keep the weights of SigLIP's attention pooling, so that a converted release is complete. The forward pass does
    not use them."""

    @model_validator(mode="after")
    def _relations(self) -> "VisionConfig":
        _check_divisible("model.vision", "hidden_size", self.hidden_size, "num_heads", self.num_heads)
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"model.vision.image_size={self.image_size} is smaller than one patch, patch_size={self.patch_size}; "
                "choose image_size >= patch_size."
            )
        return self

    @property
    def num_patches(self) -> int:
        """Patches of an image: whole ones only, as a convolution without padding gives."""
        return (self.image_size // self.patch_size) ** 2


class ResamplerConfig(Section):
    """Perceiver resampler from an encoder's features to decoder embeddings; the defaults are AKI's."""

    num_latents: Size = 144
    """Latent queries: positions that one image (or recording) takes in the decoder's sequence."""
    num_layers: Layers = 6
    """Number of layers of cross-attention and feed-forward block."""
    num_heads: Size = 8
    """Number of attention heads."""
    head_dim: Size = 64
    """Dimension of an attention head."""
    mlp_ratio: Size = 4
    """Hidden size of the feed-forward block, as a multiple of the encoder's hidden_size."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the layer norms."""


class AudioConfig(Section):
    """Whisper's encoder (Radford et al., 2022) and its resampler; the default sizes are openai/whisper-small's."""

    sample_rate: Annotated[Literal[16000], BeforeValidator(no_stand_in)] = 16000
    """Samples per second of every recording; Whisper's is 16000."""
    seconds: Annotated[PositiveInt, AtMost(3600)] = 30
    """Length of the encoder's input in seconds: shorter recordings are padded with silence, longer ones are refused.
    Published Whisper weights need 30."""
    num_mel_bins: Annotated[PositiveInt, AtMost(200)] = 80
    """Mel bands of the spectrogram: 80, in whisper-large-v3 128."""
    hidden_size: Size = 768
    """Hidden size of the transformer."""
    num_layers: Layers = 12
    """Number of transformer layers."""
    num_heads: Size = 12
    """Number of attention heads."""
    intermediate_size: Size = 3072
    """Hidden size of the feed-forward block."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the layer norms."""
    resampler: ResamplerConfig = ResamplerConfig()

    @model_validator(mode="after")
    def _relations(self) -> "AudioConfig":
        _check_divisible("model.audio", "hidden_size", self.hidden_size, "num_heads", self.num_heads)
        if self.hidden_size % 2 or self.hidden_size < 4:
            raise ConfigError(
                f"model.audio.hidden_size={self.hidden_size} must be even and at least 4: half of it holds sines of "
                "the position, half cosines."
            )
        return self

    @property
    def num_frames(self) -> int:
        """Frames of the spectrogram: one in 10 ms."""
        return 100 * self.seconds

    @property
    def num_positions(self) -> int:
        """Features of a recording: the second convolution halves the frames."""
        return self.num_frames // 2


class RopeConfig(Section):
    """Rotary position embedding, with the scaling types of transformers.

    longrope (Phi-3) divides each frequency by a factor: short_factor for sequences up to
    original_max_position_embeddings, long_factor beyond; it scales cos and sin by
    sqrt(1 + ln(max / original) / ln(original)). llama3 (LLaMA 3.1 and later) divides low frequencies by factor, keeps
    high ones, and interpolates between.
    """

    rope_type: Literal["default", "longrope", "llama3"] = "default"
    """Scaling of the frequencies; default: none."""
    theta: PositiveFloat = 10000.0
    """Base of the frequencies."""
    max_position_embeddings: Size = 4096
    """Longest sequence of the decoder, in positions."""
    original_max_position_embeddings: Size = 4096
    """Longest sequence of the decoder before it was extended by scaling, in positions."""
    short_factor: Floats = ()
    """longrope: one factor per frequency, head_dim / 2 of them, for short sequences."""
    long_factor: Floats = ()
    """longrope: the same for long sequences."""
    factor: PositiveFloat = 1.0
    """llama3: what low frequencies are divided by."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: a wavelength above original_max_position_embeddings / low_freq_factor positions is a low frequency."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: a wavelength below original_max_position_embeddings / high_freq_factor positions is a high frequency."""

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
                "model.decoder.rope.original_max_position_embeddings="
                f"{self.original_max_position_embeddings} must lie in "
                f"[2, max_position_embeddings={self.max_position_embeddings}] for rope_type=longrope."
            )
        return self


class DecoderConfig(Section):
    """Language model, of a registered family; the defaults are AKI-4B's.

    A decoder of another head_dim needs a rope of its own: the default holds 48 factors, for head_dim 96.
    """

    family: Annotated[str, OneOf(FAMILIES)] = DEFAULT_FAMILY
    """Decoder family: biases and norms of the attention, tensor names in Hugging Face folders, chat format."""
    hidden_size: Size = 3072
    """Hidden size of the transformer."""
    num_layers: Layers = 32
    """Number of transformer layers."""
    num_heads: Size = 32
    """Number of query heads."""
    head_dim: int = Field(default=0, ge=0, le=2**24)
    """Dimension of an attention head; 0 takes hidden_size / num_heads, as most models have it (Qwen3-0.6B and 4B have
    128 instead)."""
    num_kv_heads: Size = 32
    """Number of key and value heads; fewer than num_heads is grouped-query attention."""
    intermediate_size: Size = 8192
    """Hidden size of the feed-forward block (SwiGLU)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the RMS norms."""
    padded_vocab_size: Size = 32064
    """Rows of the embedding table and of the LM head, padding included."""
    vocab_size: Size = 32012
    """Tokens whose ids index the embedding table and the LM head."""
    num_added_tokens: int = Field(default=2, ge=0, le=2**24)
    """Tokens with embeddings of their own beside the table (AKI: <image>, <|endofchunk|>), with the ids vocab_size to
    vocab_size + num_added_tokens - 1."""
    lm_head_bias: bool = True
    """Whether the LM head has a bias, as in AKI and unlike in stock language models."""
    tie_word_embeddings: bool = False
    """Whether the LM head shares its weight with the embedding table."""
    rope: RopeConfig = RopeConfig(**DEFAULT_ROPE)

    @model_validator(mode="after")
    def _relations(self) -> "DecoderConfig":
        if not self.head_dim:
            _check_divisible("model.decoder", "hidden_size", self.hidden_size, "num_heads", self.num_heads)
            # the section is frozen once it is valid; every reader has the resolved number
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        _check_divisible("model.decoder", "num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        if self.head_dim % 2:
            raise ConfigError(
                f"model.decoder.head_dim={self.head_dim} (hidden_size / num_heads where it is not set) must be even: "
                "rotary embedding needs pairs."
            )
        if self.total_vocab_size > self.padded_vocab_size:
            raise ConfigError(
                f"model.decoder: vocab_size + num_added_tokens = {self.total_vocab_size} exceeds "
                f"padded_vocab_size={self.padded_vocab_size}; "
                "choose padded_vocab_size at least as large."
            )
        for name in ("short_factor", "long_factor") if self.rope.rope_type == "longrope" else ():
            got, needed = len(getattr(self.rope, name)), self.head_dim // 2
            if got != needed:
                raise ConfigError(
                    f"model.decoder.rope.{name} has {got} values, head_dim={self.head_dim} needs {needed}; "
                    "give that many, or write rope: {rope_type: default}."
                )
        return self

    @field_serializer("head_dim")
    def _follows_other_sizes(self, head_dim: int) -> int:
        """Write 0 where it follows from other sizes, so that it still does when a flag changes one of them."""
        return 0 if head_dim * self.num_heads == self.hidden_size else head_dim

    @property
    def traits(self) -> FamilyTraits:
        """Parameters of the attention that the family has."""
        return FAMILIES[self.family].traits

    @property
    def attention_size(self) -> int:
        """Features of all query heads together; hidden_size in most models."""
        return self.num_heads * self.head_dim

    @property
    def total_vocab_size(self) -> int:
        """Number of tokens that the model can predict, added ones included."""
        return self.vocab_size + self.num_added_tokens


class ModelConfig(Section):
    """The whole model; the default sizes are AKI-4B's."""

    vision: VisionConfig = VisionConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    decoder: DecoderConfig = DecoderConfig()
    audio: AudioConfig | None = None
    """Encoder and resampler of recordings; null: the model takes no audio."""

    @property
    def max_media_positions(self) -> int:
        """Positions of one item of every modality together."""
        return self.resampler.num_latents + (self.audio.resampler.num_latents if self.audio else 0)
