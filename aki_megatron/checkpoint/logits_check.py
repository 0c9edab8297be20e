"""The final check of a conversion: both sides must compute the same logits, with the MMA mask active.

The native side is our model, one decoder layer at a time; the other one is checkpoint/hf_reference.py. Both run in
fp32, so that only the conversion can make a difference, and hold one layer in memory.

B sequences, T positions, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aki_megatron.checkpoint.hf_reference import HFReferenceModel, Reference
from aki_megatron.checkpoint.tensors import TensorSource
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.model.stage import TIED_PARAMETERS, Stage, build_stage
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality, stack_ids

TOLERANCE = 1e-4
"""Largest difference of two logits, relative to the largest logit, that always passes as fp32 rounding."""

PERTURBATION, AMPLIFICATION_MARGIN = 2.0**-23, 4
"""Some models amplify rounding errors from layer to layer. To measure by how much, hidden states perturbed by one unit
in the last place of fp32 pass the layers as well; AMPLIFICATION_MARGIN times their effect on the logits passes too."""

MASK_SENSITIVITY = 100
"""A causal mask must change the logits by this many times the limit, or the check could not notice a lost mask."""


@dataclass(frozen=True)
class LogitsComparison:
    """Logits of both sides, compared."""

    max_difference: float
    scale: float
    """Largest absolute logit of the reference."""
    causal_difference: float
    """Largest change that a causal mask makes."""
    perturbed_difference: float
    """Largest change that perturbing the first hidden states by one unit in the last place makes."""
    num_positions: int
    """Positions whose logits were compared: all that are not padding."""
    diverged_at: str
    """Where the hidden states of both sides first differ; empty where they do not."""
    not_compared: tuple[str, ...]
    """Native tensors that the reference does not hold."""

    @property
    def limit(self) -> float:
        """Largest difference that passes."""
        return _rounding_limit(self.scale, self.perturbed_difference)

    @property
    def mask_matters(self) -> bool:
        """Whether a lost mask would have been noticed."""
        return self.causal_difference > MASK_SENSITIVITY * self.limit

    @property
    def passed(self) -> bool:
        """Whether the logits are equal and the mask matters; False where a logit is NaN."""
        return self.max_difference <= self.limit and self.mask_matters

    def text(self) -> str:
        """A few lines for a person."""
        lines = [
            f"logits check, MMA mask active: {'passed' if self.passed else 'FAILED'}. Largest difference "
            f"{self.max_difference:.1e} (limit {self.limit:.1e}) of logits up to {self.scale:.1f} at "
            f"{self.num_positions} positions; a causal mask would change them by {self.causal_difference:.1e}"
        ]
        if self.diverged_at:
            lines.append(f"  the hidden states diverge {self.diverged_at}")
        if not self.mask_matters:
            lines.append(
                "  a causal mask changes next to nothing: the check cannot tell whether the MMA mask is active"
            )
        if self.not_compared:
            groups = Counter(".".join(name.split(".")[:2]) for name in self.not_compared)
            listed = ", ".join(f"{group} ({count})" for group, count in sorted(groups.items()))
            lines.append(f"  not compared, the reference has no such tensors: {listed}")
        return "\n".join(lines)


@torch.no_grad()
def check_logits(native: TensorSource, config: ModelConfig, reference: Reference) -> LogitsComparison:
    """Compute the logits of a synthetic batch with both sides: an image with question and answer, and a text.

    native  our tensors by parameter name. Where the two sides store a tensor in different precision, both are rounded
            to the lower one, so that the conversion is compared and not the rounding.
    """
    model = HFReferenceModel(native, config, reference)
    batch = synthetic_batch(config)
    valid, ids = batch.modality_ids != Modality.PAD, stack_ids(batch)
    hidden, mutual = batch.token_ids, model.embed(batch)
    causal, rotary, diverged_at = mutual, model.rotary(valid), ""
    signs = torch.randn(mutual.shape, generator=torch.Generator().manual_seed(0)).sign()
    perturbed = mutual * (1 + PERTURBATION * signs)
    for number in range(config.decoder.num_layers):
        stage = stage_from_tensors(config, [number], AttentionConfig(rule="mma"), model.native_tensor)
        hidden = (stage if stage.lm_head is None else stage.logits)(hidden, ids, batch.media)
        del stage  # free it before the reference's layer is read
        layer = model.layer(number)
        mutual, causal, perturbed = (
            layer(states, attention_mask=_additive_mask(batch, mutual=is_mutual), position_embeddings=rotary)
            for states, is_mutual in ((mutual, True), (causal, False), (perturbed, True))
        )
        del layer
        if not diverged_at and number < config.decoder.num_layers - 1:
            limit = _rounding_limit(_max_abs(mutual[valid]), _max_abs((perturbed - mutual)[valid]))
            if not _max_abs((hidden - mutual)[valid]) <= limit:  # not <=: NaN diverges
                diverged_at = f"in decoder layer {number}" + (" or before it" if number == 0 else "")
    expected = model.logits(torch.stack([mutual[valid], causal[valid], perturbed[valid]]))
    return LogitsComparison(
        max_difference=_max_abs(hidden[valid][:, : config.decoder.total_vocab_size] - expected[0]),
        scale=_max_abs(expected[0]),
        causal_difference=_max_abs(expected[0] - expected[1]),
        perturbed_difference=_max_abs(expected[0] - expected[2]),
        num_positions=int(valid.sum()),
        diverged_at=diverged_at,
        not_compared=model.missing,
    )


def _max_abs(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _rounding_limit(scale: float, perturbed_difference: float) -> float:
    """Largest difference that is rounding, for values up to ``scale``."""
    return max(TOLERANCE * scale, AMPLIFICATION_MARGIN * perturbed_difference)


def synthetic_batch(config: ModelConfig) -> Batch:
    """A sequence of system text, an item of every modality, question and answer; one of text with every added token."""
    decoder, audio, generator = config.decoder, config.audio, torch.Generator().manual_seed(0)
    text, response = int(Modality.TEXT), int(Modality.RESPONSE)
    media = [int(Modality.IMAGE)] * config.resampler.num_latents
    media += [int(Modality.AUDIO)] * audio.resampler.num_latents if audio else []
    sequences = [
        [text] * 6 + media + [text] * 9 + [response] * 6,
        [text] * (4 + decoder.num_added_tokens) + [response] * 4,
    ]
    length = max(map(len, sequences))
    padded = [sequence + [int(Modality.PAD)] * (length - len(sequence)) for sequence in sequences]
    modality = torch.tensor(padded, dtype=torch.int8)
    valid = modality != Modality.PAD
    tokens = torch.randint(decoder.vocab_size, modality.shape, generator=generator)
    tokens[0, 0] = decoder.vocab_size - 1  # the last row of the embedding that a token uses
    tokens[1, 4 : 4 + decoder.num_added_tokens] = torch.arange(decoder.vocab_size, decoder.total_vocab_size)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:].where(modality[:, 1:] == response, IGNORE)
    positions = torch.arange(length).expand_as(tokens).where(valid, 0)
    size = config.vision.image_size
    items = {Modality.IMAGE: torch.rand(1, 3, size, size, generator=generator) * 2 - 1}
    if audio:
        items[Modality.AUDIO] = torch.rand(1, audio.num_mel_bins, audio.num_frames, generator=generator) * 2 - 1
    return Batch(
        token_ids=tokens,
        modality_ids=modality,
        segment_ids=torch.zeros_like(tokens).where(valid, NO_SEGMENT),
        position_ids=positions,
        targets=targets,
        media=items,
    )


def _additive_mask(batch: Batch, *, mutual: bool) -> Tensor:
    """What transformers adds to attention scores, [B, 1, T, T]: causal, and media see the prompt text after them.

    It is written for ``synthetic_batch`` (one prompt) and shares no code with aki_megatron.attention.
    """
    query, key = batch.modality_ids[:, :, None], batch.modality_ids[:, None, :]
    allowed = torch.ones(batch.token_ids.shape[1:] * 2, dtype=torch.bool).tril() & (key != Modality.PAD)
    if mutual:
        allowed = allowed | (((query == Modality.IMAGE) | (query == Modality.AUDIO)) & (key == Modality.TEXT))
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min).unsqueeze(1)


def stage_from_tensors(
    config: ModelConfig, layers: Sequence[int], attention: AttentionConfig, tensor: Callable[[str], Tensor]
) -> Stage:
    """Build a stage of these decoder layers; the first has the input embedder too, and the last the LM head.

    tensor  returns a tensor by its native name; the stage takes it as it is
    """
    with torch.device("meta"):
        stage = build_stage(config, layers, attention=attention)
    tied = TIED_PARAMETERS if config.decoder.tie_word_embeddings else {}
    stage.load_state_dict({name: tensor(tied.get(name, name)) for name in stage.state_dict()}, assign=True)
    return stage
