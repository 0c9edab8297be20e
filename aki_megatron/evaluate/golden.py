"""Does our model compute what the official release's own code computed? Golden numbers against ours.

Each function ``_..._made`` computes quantities under the names that a folder of golden numbers records them by; a case
is then compared name by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.checkpoint.official import official_names
from aki_megatron.errors import CheckpointError
from aki_megatron.evaluate.generate import Continuation, generate
from aki_megatron.evaluate.golden_files import INPUTS, Case, Golden
from aki_megatron.model.stage import Stage
from aki_megatron.types import IGNORE, Modality, stack_ids

LIMITS = {"loss": 2e-5, "grad_norm": 1e-4, "grad": 1e-4}
"""Largest difference that is rounding; of gradients relative to their norm. Integers and masks must be equal."""

ACTIVATION_LIMIT = 5e-4
"""The same for every other quantity: features, embeddings, hidden states, logits."""


@dataclass(frozen=True)
class Finding:
    """How far our value of one quantity is from the recorded one."""

    quantity: str
    difference: float
    """Largest absolute difference; relative for gradients; number of entries for integers and masks."""
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it is rounding; never where it is not a number."""
        return self.difference <= self.limit

    def text(self) -> str:
        """A few words for a line of the report."""
        if self.limit == 0:
            return f"{self.quantity} equal" if self.passed else f"{self.quantity} {self.difference:.0f} ENTRIES DIFFER"
        return f"{self.quantity} {self.difference:.1e}" + ("" if self.passed else f" ABOVE {self.limit:.0e}")


def verify_golden(folder: Path, report: Callable[[str], None]) -> bool:
    """Compute every case of a folder and report one line each; whether all are reproduced within the limits.

    Raises CheckpointError for a folder that cannot be read.
    """
    golden = Golden(folder)
    model = golden.model()
    passed = 0
    for name in golden.cases:
        findings = check_case(model, golden.case(name))
        good = all(finding.passed for finding in findings)
        report(f"{name}: {'ok' if good else 'FAILED'}  {', '.join(finding.text() for finding in findings)}")
        passed += good
    report(f"{passed} of {len(golden.cases)} cases reproduced")
    return passed == len(golden.cases)


def check_case(model: Stage, case: Case) -> list[Finding]:
    """Compute everything that a case records, and compare. Raises CheckpointError for a quantity not known here."""
    recorded = {name: value for name, value in case.recorded.items() if name not in INPUTS}
    made = _ids_made(case) | _features_made(model, case)
    made |= _steps_made(model, case) if "generated_ids" in recorded else _forward_made(model, case)
    gradients = {name for name in recorded if name.startswith(("grad_norm/", "grad/"))}
    if gradients:
        made |= _gradients_made(model, case)
    unknown = sorted(recorded.keys() - made.keys())
    if unknown or not recorded:
        raise CheckpointError(
            f"Not known how to compute {', '.join(unknown) or 'a case that records nothing'}; known here: "
            f"{', '.join(sorted(name for name in made if '/' not in name))}, grad_norm/NAME, grad/NAME."
        )
    if "inputs_embeds" in recorded and recorded["inputs_embeds"].shape[:2] == case.valid.shape:
        recorded["inputs_embeds"] = recorded["inputs_embeds"][case.valid]  # what stands on padding does not matter
    if "expanded_labels" in recorded:
        recorded["expanded_labels"] = recorded["expanded_labels"][:, 1:]  # nothing predicts the first token
    findings = [_finding(name, made[name], recorded[name]) for name in made if name in recorded.keys() - gradients]
    for kind in ("grad_norm", "grad"):
        names = [name for name in gradients if name.startswith(f"{kind}/")]
        if names:
            each = [_finding(name, made[name], recorded[name]).difference for name in names]
            worst = float(torch.tensor(each, dtype=torch.float64).max())  # unlike max(), keeps what is not a number
            findings.append(Finding(f"{kind} of {len(names)}", worst, LIMITS[kind]))
    return findings


def _finding(name: str, ours: Tensor, theirs: Tensor) -> Finding:
    kind = name.split("/")[0]
    limit = LIMITS.get(kind, ACTIVATION_LIMIT) if theirs.is_floating_point() else 0.0
    if ours.numel() != theirs.numel():
        return Finding(kind, float("inf"), limit)
    ours = ours.detach().reshape(theirs.shape)
    if limit == 0:
        return Finding(kind, float((ours != theirs).sum()), limit)
    distance = ours.double() - theirs.double()
    if kind in ("grad", "grad_norm"):
        # 1e-3: a gradient that is exactly zero is reproduced by one that is nearly so
        return Finding(kind, float(distance.norm() / (theirs.double().norm() + 1e-3)), limit)
    return Finding(kind, float(distance.abs().max()) if distance.numel() else 0.0, limit)


def _ids_made(case: Case) -> dict[str, Tensor]:
    """What follows from the ids alone."""
    batch, valid = case.batch, case.valid
    layout = AttentionMask.build(batch.modality_ids, batch.segment_ids, rule="mma", scored=batch.targets != IGNORE)
    spans = []
    for row, live in zip(batch.modality_ids.tolist(), valid.sum(dim=1).tolist(), strict=True):
        start = row.index(Modality.IMAGE) if Modality.IMAGE in row else -1
        end = start + row.count(Modality.IMAGE) if start >= 0 else -1
        # the marker is the last of the prompt; in a row without one all text is a response
        marker = max((place for place, kind in enumerate(row) if kind == Modality.TEXT), default=-1)
        spans.append([start, end, marker if start >= 0 else -1, live])
    return {
        "expanded_mask": layout.dense(),
        "expanded_labels": batch.targets[:, :-1],
        "valid": valid,
        "spans": torch.tensor(spans),
    }


@torch.no_grad()
def _features_made(model: Stage, case: Case) -> dict[str, Tensor]:
    assert model.front is not None
    batch = case.batch
    made = {"inputs_embeds": model.front(batch.token_ids, batch.modality_ids, batch.pixels)[case.valid]}
    if "pixel_values" in case.recorded:
        # pictures of rows without an image token are encoded too, and then not used
        made["image_features"] = model.front.vision(case.recorded["pixel_values"].flatten(0, 2).float())
        made["vision_tokens"] = model.front.resampler(made["image_features"])
    return made


@torch.no_grad()
def _forward_made(model: Stage, case: Case) -> dict[str, Tensor]:
    assert model.head is not None
    batch, ids = case.batch, stack_ids(case.batch)
    hidden: list[Tensor] = []
    hook = model.head.norm.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    logits = model.logits(batch.token_ids, ids, batch.pixels)[case.valid]
    hook.remove()
    return {
        "final_hidden": hidden[0][case.valid],
        "logits": logits[:, case.columns],
        "logits_logsumexp": logits.logsumexp(dim=-1),
        "logits_argmax": logits.argmax(dim=-1),
        "loss": model(batch.token_ids, ids, batch.pixels) / batch.supervised_tokens,
    }


def _gradients_made(model: Stage, case: Case) -> dict[str, Tensor]:
    batch, theirs = case.batch, official_names(model.config)
    model.zero_grad()
    (model(batch.token_ids, stack_ids(batch), batch.pixels) / batch.supervised_tokens).backward()
    made: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # fp64: a fp32 norm over two million numbers is itself off by 1e-4
            made[f"grad_norm/{theirs[name][0]}"] = parameter.grad.double().norm()
            made[f"grad/{theirs[name][0]}"] = parameter.grad
    model.zero_grad()
    return made


def _steps_made(model: Stage, case: Case) -> dict[str, Tensor]:
    """Greedy generation, and the logits of each step after the recorded tokens before it."""
    recorded = case.recorded["generated_ids"].flatten()
    text = Continuation(model, case.batch, len(recorded))
    logits = torch.cat([text.start(), *(text.extend(token[None]) for token in recorded[:-1])])
    best = logits.topk(case.recorded["step_top8_ids"].shape[-1] if "step_top8_ids" in case.recorded else 1)
    full = case.recorded.get("step_logits_full", logits[:0])
    return {
        "generated_ids": torch.tensor(generate(model, case.batch, stop_ids=(), max_new_tokens=len(recorded))),
        "step_logits": logits[:, case.columns],
        "step_logsumexp": logits.logsumexp(dim=-1),
        "step_top8_ids": best.indices,
        "step_top8_values": best.values,
        "step_logits_full": logits[: len(full), : full.shape[-1]],
    }
