"""Compare what our model computes with golden values: what the official release's own code computed.

Each function ``_compute_...`` returns quantities under the names that a folder of golden values records them by, and a
case is then compared name by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.checkpoint.official import official_names
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.evaluate.generate import GenerationState, generate
from aki_megatron.evaluate.golden_files import INPUTS, GoldenCase, GoldenFolder
from aki_megatron.model.stage import Stage
from aki_megatron.types import IGNORE, Modality, stack_ids

LIMITS = {"loss": 2e-5, "grad_norm": 1e-4, "grad": 1e-4}
"""Largest difference that is rounding; of gradients relative to their norm. Integers and masks must be equal."""

ACTIVATION_LIMIT = 5e-4
"""The limit of every other quantity: features, embeddings, hidden states, logits."""


@dataclass(frozen=True)
class QuantityComparison:
    """How far our value of one quantity is from the recorded one."""

    quantity: str
    difference: float
    """Largest absolute difference; relative for gradients; number of different entries for integers and masks."""
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is rounding; False where it is NaN."""
        return self.difference <= self.limit

    def text(self) -> str:
        """A few words for a line of the report."""
        if self.limit == 0:
            return f"{self.quantity} equal" if self.passed else f"{self.quantity} {self.difference:.0f} ENTRIES DIFFER"
        return f"{self.quantity} {self.difference:.1e}" + ("" if self.passed else f" ABOVE {self.limit:.0e}")


def verify_golden(folder: Path, report: Callable[[str], None]) -> bool:
    """Compute every case of a folder, report one line each, and return whether all are within the limits.

    Raises CheckpointError for a folder that cannot be read.
    """
    golden = GoldenFolder(folder)
    model = golden.model()
    num_passed = 0
    for name in golden.case_names:
        comparisons = check_case(model, golden.case(name))
        passed = all(comparison.passed for comparison in comparisons)
        texts = ", ".join(comparison.text() for comparison in comparisons)
        report(f"{name}: {'ok' if passed else 'FAILED'}  {texts}")
        num_passed += passed
    report(f"{num_passed} of {len(golden.case_names)} cases reproduced")
    return num_passed == len(golden.case_names)


def check_case(model: Stage, case: GoldenCase) -> list[QuantityComparison]:
    """Compute everything that a case records, and compare it. Raises CheckpointError for an unknown quantity."""
    recorded = {name: value for name, value in case.recorded.items() if name not in INPUTS}
    computed = _compute_from_ids(case) | _compute_features(model, case)
    computed |= _compute_generation(model, case) if "generated_ids" in recorded else _compute_forward(model, case)
    gradients = {name for name in recorded if name.startswith(("grad_norm/", "grad/"))}
    if gradients:
        computed |= _compute_gradients(model, case)
    unknown = sorted(recorded.keys() - computed.keys())
    if unknown or not recorded:
        raise CheckpointError(
            f"Not known how to compute {', '.join(unknown) or 'a case that records nothing'}; known here: "
            f"{', '.join(sorted(name for name in computed if '/' not in name))}, grad_norm/NAME, grad/NAME."
        )
    if "inputs_embeds" in recorded and recorded["inputs_embeds"].shape[:2] == case.valid.shape:
        recorded["inputs_embeds"] = recorded["inputs_embeds"][case.valid]  # embeddings of padding do not matter
    if "expanded_labels" in recorded:
        recorded["expanded_labels"] = recorded["expanded_labels"][:, 1:]  # no position predicts the first token
    names = [name for name in computed if name in recorded.keys() - gradients]
    comparisons = [_compare(name, computed[name], recorded[name]) for name in names]
    for kind in ("grad_norm", "grad"):
        names = [name for name in gradients if name.startswith(f"{kind}/")]
        if names:
            differences = [_compare(name, computed[name], recorded[name]).difference for name in names]
            worst = float(torch.tensor(differences, dtype=torch.float64).max())  # unlike max(), it keeps NaN
            comparisons.append(QuantityComparison(f"{kind} of {len(names)}", worst, LIMITS[kind]))
    return comparisons


def _compare(name: str, computed: Tensor, recorded: Tensor) -> QuantityComparison:
    kind = name.split("/")[0]
    limit = LIMITS.get(kind, ACTIVATION_LIMIT) if recorded.is_floating_point() else 0.0
    if computed.numel() != recorded.numel():
        return QuantityComparison(kind, float("inf"), limit)
    computed = computed.detach().reshape(recorded.shape)
    if limit == 0:
        return QuantityComparison(kind, float((computed != recorded).sum()), limit)
    difference = computed.double() - recorded.double()
    if kind in ("grad", "grad_norm"):
        # 1e-3: a gradient that is exactly zero is reproduced by one that is nearly so
        return QuantityComparison(kind, float(difference.norm() / (recorded.double().norm() + 1e-3)), limit)
    return QuantityComparison(kind, float(difference.abs().max()) if difference.numel() else 0.0, limit)


def _compute_from_ids(case: GoldenCase) -> dict[str, Tensor]:
    """Quantities that follow from the ids alone."""
    batch, valid = case.batch, case.valid
    mask = AttentionMask.build(
        batch.modality_ids, batch.segment_ids, AttentionConfig(rule="mma"), supervised=batch.targets != IGNORE
    )
    spans = []
    for modalities, length in zip(batch.modality_ids.tolist(), valid.sum(dim=1).tolist(), strict=True):
        start = modalities.index(Modality.IMAGE) if Modality.IMAGE in modalities else -1
        end = start + modalities.count(Modality.IMAGE) if start >= 0 else -1
        # the assistant marker is the last prompt token; in a sequence without one all text is a response
        marker = max((position for position, kind in enumerate(modalities) if kind == Modality.TEXT), default=-1)
        spans.append([start, end, marker if start >= 0 else -1, length])
    return {
        "expanded_mask": mask.dense(),
        "expanded_labels": batch.targets[:, :-1],
        "valid": valid,
        "spans": torch.tensor(spans),
    }


@torch.no_grad()
def _compute_features(model: Stage, case: GoldenCase) -> dict[str, Tensor]:
    assert model.input_embedder is not None
    batch, embedder = case.batch, model.input_embedder
    computed = {"inputs_embeds": embedder(batch.token_ids, batch.modality_ids, batch.media)[case.valid]}
    if "pixel_values" in case.recorded:
        # images of sequences without an image token are encoded too, and then not used
        computed["image_features"] = embedder.get_submodule("vision_encoder")(
            case.recorded["pixel_values"].flatten(0, 2).float()
        )
        computed["vision_tokens"] = embedder.get_submodule("resampler")(computed["image_features"])
    return computed


@torch.no_grad()
def _compute_forward(model: Stage, case: GoldenCase) -> dict[str, Tensor]:
    assert model.lm_head is not None
    batch, ids = case.batch, stack_ids(case.batch)
    hidden: list[Tensor] = []
    hook = model.lm_head.norm.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    logits = model.logits(batch.token_ids, ids, batch.media)[case.valid]
    hook.remove()
    return {
        "final_hidden": hidden[0][case.valid],
        "logits": logits[:, case.logit_columns],
        "logits_logsumexp": logits.logsumexp(dim=-1),
        "logits_argmax": logits.argmax(dim=-1),
        "loss": model(batch.token_ids, ids, batch.media) / batch.supervised_tokens,
    }


def _compute_gradients(model: Stage, case: GoldenCase) -> dict[str, Tensor]:
    batch, external = case.batch, official_names(model.config)
    model.zero_grad()
    (model(batch.token_ids, stack_ids(batch), batch.media) / batch.supervised_tokens).backward()
    computed: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # fp64: an fp32 norm over two million elements is itself off by 1e-4
            computed[f"grad_norm/{external[name][0]}"] = parameter.grad.double().norm()
            computed[f"grad/{external[name][0]}"] = parameter.grad
    model.zero_grad()
    return computed


def _compute_generation(model: Stage, case: GoldenCase) -> dict[str, Tensor]:
    """Greedy generation, and the logits of each step given the recorded tokens before it."""
    recorded = case.recorded["generated_ids"].flatten()
    state = GenerationState(model, case.batch, len(recorded))
    logits = torch.cat([state.prefill(), *(state.decode_step(token[None]) for token in recorded[:-1])])
    best = logits.topk(case.recorded["step_top8_ids"].shape[-1] if "step_top8_ids" in case.recorded else 1)
    full = case.recorded.get("step_logits_full", logits[:0])
    return {
        "generated_ids": torch.tensor(generate(model, case.batch, stop_ids=(), max_new_tokens=len(recorded))),
        "step_logits": logits[:, case.logit_columns],
        "step_logsumexp": logits.logsumexp(dim=-1),
        "step_top8_ids": best.indices,
        "step_top8_values": best.values,
        "step_logits_full": logits[: len(full), : full.shape[-1]],
    }
