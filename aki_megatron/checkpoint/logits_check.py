"""The last check of a conversion: do both sides compute the same logits, with the MMA mask active?

Ours is our own model, one decoder layer at a time; the other side (checkpoint/hf_reference.py) goes beside it. In fp32, so
that what differs is the conversion; of four billion weights one layer is in memory.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aki_megatron.checkpoint.hf_reference import HFReferenceModel, Reference
from aki_megatron.checkpoint.tensors import TensorSource
from aki_megatron.config.model import ModelConfig
from aki_megatron.model.stage import TIED, Stage, build_stage
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality, stack_ids

TOLERANCE = 1e-4
"""Largest difference of two logits, relative to the largest logit, that always passes as rounding in fp32."""

NUDGE, ROUNDINGS = 2.0**-23, 4
"""Some models amplify rounding from layer to layer. How much is measured: hidden states that differ by one unit in the
last place of fp32 go through the layers as well, and ROUNDINGS times what they change in the end passes too."""

VISIBLE = 100
"""A causal mask must change the logits this many times more than the tolerance, or the check is blind to the mask."""


@dataclass(frozen=True)
class LogitsReport:
    """What the comparison found."""

    max_difference: float
    scale: float
    """The largest logit of the other side, without its sign."""
    causal_difference: float
    """What a causal mask would change."""
    nudged_difference: float
    """What one unit in the last place of the first hidden states changes."""
    places: int
    """Places whose logits were compared: all that are not padding."""
    parted: str
    """Where the two sides' hidden states part first; empty where they do not."""
    not_compared: tuple[str, ...]
    """Our tensors that the other side does not hold."""

    @property
    def limit(self) -> float:
        """Largest difference that passes."""
        return _limit(self.scale, self.nudged_difference)

    @property
    def sees_the_mask(self) -> bool:
        """Whether a lost mask would have been noticed."""
        return self.causal_difference > VISIBLE * self.limit

    @property
    def passed(self) -> bool:
        """Equal, and the mask mattered; never where a logit is not a number."""
        return self.max_difference <= self.limit and self.sees_the_mask

    def text(self) -> str:
        """A few lines for a person."""
        lines = [
            f"logits check, MMA mask active: {'passed' if self.passed else 'FAILED'}. Largest difference "
            f"{self.max_difference:.1e} (limit {self.limit:.1e}) of logits up to {self.scale:.1f} at {self.places} "
            f"places; a causal mask would change them by {self.causal_difference:.1e}"
        ]
        if self.parted:
            lines.append(f"  the two sides part {self.parted}")
        if not self.sees_the_mask:
            lines.append(
                "  a causal mask changes next to nothing here: the check cannot see whether the mask is active"
            )
        if self.not_compared:
            groups = Counter(".".join(name.split(".")[:2]) for name in self.not_compared)
            listed = ", ".join(f"{group} ({count})" for group, count in sorted(groups.items()))
            lines.append(f"  not compared, the other side has no such tensors: {listed}")
        return "\n".join(lines)


@torch.no_grad()
def check_logits(ours: TensorSource, config: ModelConfig, reference: Reference) -> LogitsReport:
    """Compute a drawn batch on both sides: a row with system text, image, question and answer, and one of text.

    ours  our tensors by parameter name. Where the two sides store a tensor in different precision, both are rounded to
          the lower one, so that what is compared is the conversion and not the rounding.
    """
    theirs = HFReferenceModel(ours, config, reference)
    batch = draw_batch(config)
    live, ids = batch.modality_ids != Modality.PAD, stack_ids(batch)
    ours_now, mutual = batch.token_ids, theirs.start(batch)
    causal, turns, parted = mutual, theirs.turns(live), ""
    nudged = mutual * (1 + NUDGE * torch.randn(mutual.shape, generator=torch.Generator().manual_seed(0)).sign())
    for number in range(config.decoder.num_layers):
        stage = _our_stage(number, config, theirs.ours)
        ours_now = (stage if stage.head is None else stage.logits)(
            ours_now, ids, None if stage.front is None else batch.pixels
        )
        del stage  # before the other side's layer is read
        layer = theirs.layer(number)
        mutual, causal, nudged = (
            layer(hidden, attention_mask=_mask(batch, mutual=is_mutual), position_embeddings=turns)
            for hidden, is_mutual in ((mutual, True), (causal, False), (nudged, True))
        )
        del layer
        if not parted and number < config.decoder.num_layers - 1:
            limit = _limit(float(mutual[live].abs().max()), float((nudged - mutual)[live].abs().max()))
            if not float((ours_now - mutual)[live].abs().max()) <= limit:
                parted = f"in decoder layer {number}" + (" or before it" if number == 0 else "")
    expected = theirs.logits(torch.stack([mutual[live], causal[live], nudged[live]]))
    return LogitsReport(
        max_difference=float((ours_now[live][:, : config.decoder.total_vocab_size] - expected[0]).abs().max()),
        scale=float(expected[0].abs().max()),
        causal_difference=float((expected[0] - expected[1]).abs().max()),
        nudged_difference=float((expected[0] - expected[2]).abs().max()),
        places=int(live.sum()),
        parted=parted,
        not_compared=theirs.not_held,
    )


def _limit(scale: float, nudged_difference: float) -> float:
    """Largest difference that is rounding, of numbers up to ``scale``."""
    return max(TOLERANCE * scale, ROUNDINGS * nudged_difference)


def draw_batch(config: ModelConfig) -> Batch:
    """A row of system text, image, question and answer, and a shorter one of text alone, with every added token."""
    decoder, generator = config.decoder, torch.Generator().manual_seed(0)
    text, image, response = int(Modality.TEXT), int(Modality.IMAGE), int(Modality.RESPONSE)
    rows = [
        [text] * 6 + [image] * config.resampler.num_latents + [text] * 9 + [response] * 6,
        [text] * (4 + decoder.num_added_tokens) + [response] * 4,
    ]
    length = max(map(len, rows))
    modality = torch.tensor([row + [int(Modality.PAD)] * (length - len(row)) for row in rows], dtype=torch.int8)
    live = modality != Modality.PAD
    tokens = torch.randint(decoder.vocab_size, modality.shape, generator=generator)
    tokens[0, 0] = decoder.vocab_size - 1  # the last row of the tables that a token uses
    tokens[1, 4 : 4 + decoder.num_added_tokens] = torch.arange(decoder.vocab_size, decoder.total_vocab_size)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:].where(modality[:, 1:] == response, IGNORE)
    positions = torch.arange(length).expand_as(tokens).where(live, 0)
    size = config.vision.image_size
    return Batch(
        token_ids=tokens,
        modality_ids=modality,
        segment_ids=torch.zeros_like(tokens).where(live, NO_SEGMENT),
        position_ids=positions,
        targets=targets,
        pixels=torch.rand(1, 3, size, size, generator=generator) * 2 - 1,
    )


def _mask(batch: Batch, *, mutual: bool) -> Tensor:
    """What transformers adds to attention scores, [B, 1, T, T]: causal, and the image sees the prompt text after it.

    Written for the drawn batch (one image, one turn); it shares nothing with our attention rules.
    """
    query, key = batch.modality_ids[:, :, None], batch.modality_ids[:, None, :]
    allowed = torch.ones(batch.token_ids.shape[1:] * 2, dtype=torch.bool).tril() & (key != Modality.PAD)
    if mutual:
        allowed = allowed | ((query == Modality.IMAGE) & (key == Modality.TEXT))
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min).unsqueeze(1)


def _our_stage(number: int, config: ModelConfig, tensor: Callable[[str], Tensor]) -> Stage:
    """Our model's stage of one decoder layer, in fp32; the first brings the front, the last the head."""
    with torch.device("meta"):
        stage = build_stage(config, [number], rule="mma")
    tied = TIED if config.decoder.tie_word_embeddings else {}
    stage.load_state_dict({name: tensor(tied.get(name, name)) for name in stage.state_dict()}, assign=True)
    return stage
