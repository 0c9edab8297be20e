"""Which settings work together: one table, read by the validator, the documentation and the tests.

Every axis has a few values. A row names the values it covers; it covers all values of an axis that it does not name. A
run is accepted when a supported row matches it and no refused row does.
Regenerate the page: ``python -m aki_megatron.config.combinations > docs/combinations.md``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aki_megatron.config.attention import ATTENTION_RULES
from aki_megatron.config.deepspeed import offload_device
from aki_megatron.config.deepspeed_page import deepspeed_section
from aki_megatron.config.markdown import link, table
from aki_megatron.config.run import RunConfig

ZERO = "tests/distributed/test_zero.py"
SPREAD = "tests/distributed/test_parallelism.py"
OFFLOAD = "tests/distributed/test_offload.py"
VALIDATION = "tests/distributed/test_validation_layouts.py"


@dataclass(frozen=True)
class Axis:
    """One column of the table."""

    heading: str
    values: tuple[str, ...]
    value: Callable[[RunConfig], str]
    """Value of a run on this axis."""
    setting: Callable[[RunConfig], str]
    """The same as the key and value of the configuration."""


def _offload(run: RunConfig) -> str:
    if offload_device(run.deepspeed, "offload_param") != "none":
        return "weights"
    device = offload_device(run.deepspeed, "offload_optimizer")
    return "none" if device == "none" else f"optimizer to {device}"


def _offload_setting(run: RunConfig) -> str:
    block = "offload_param" if _offload(run) == "weights" else "offload_optimizer"
    return f"ds_config zero_optimization.{block}.device={offload_device(run.deepspeed, block)}"


def _one_or_more(number: int) -> str:
    return "1" if number == 1 else "> 1"


def _size_axis(name: str) -> Axis:
    return Axis(
        heading=name,
        values=("1", "> 1"),
        value=lambda run: _one_or_more(getattr(run.parallel, name)),
        setting=lambda run: f"parallel.{name}={getattr(run.parallel, name)}",
    )


AXES: dict[str, Axis] = {
    "tensor": _size_axis("tensor"),
    "pipeline": _size_axis("pipeline"),
    "virtual_stages": _size_axis("virtual_stages"),
    "zero": Axis(
        heading="ZeRO",
        values=("0", "1", "2", "3"),
        value=lambda run: str(run.parallel.zero_stage),
        setting=lambda run: f"parallel.zero_stage={run.parallel.zero_stage}",
    ),
    "precision": Axis(
        heading="precision",
        values=("fp32", "bf16"),
        value=lambda run: run.train.precision,
        setting=lambda run: f"train.precision={run.train.precision}",
    ),
    "recompute": Axis(
        heading="recompute",
        values=("none", "full"),
        value=lambda run: run.parallel.recompute,
        setting=lambda run: f"parallel.recompute={run.parallel.recompute}",
    ),
    "offload": Axis(
        heading="offload",
        values=("none", "optimizer to cpu", "optimizer to nvme", "weights"),
        value=_offload,
        setting=_offload_setting,
    ),
    "rule": Axis(
        heading="rule",
        values=tuple(ATTENTION_RULES),
        value=lambda run: run.attention.rule,
        setting=lambda run: f"attention.rule={run.attention.rule}",
    ),
}
"""Axes in the order of the columns. The page also has columns for data parallelism and packing, which go with all."""


@dataclass(frozen=True)
class Combination:
    """One row: supported, with the test that proves it, or refused, with the reason and the fix."""

    name: str
    covers: Mapping[str, tuple[str, ...]]
    """Axis -> the values that the row covers; an axis that is not named is covered wholly."""
    proof: str = ""
    """File of the test that proves a supported row."""
    reason: str = ""
    """Why a refused row is refused."""
    fix: str = ""
    """What to change."""

    def matches(self, run: RunConfig) -> bool:
        """Return whether the row covers this run."""
        return all(AXES[name].value(run) in values for name, values in self.covers.items())

    def refusal(self, run: RunConfig) -> str:
        """Return the sentence for a run that this row refuses."""
        settings = " with ".join(AXES[name].setting(run) for name in self.covers)
        return f"{settings}: {self.reason}; {self.fix}."


ZERO_WITHOUT_OFFLOAD = {"zero": ("1", "2", "3"), "offload": ("none",)}
WITHOUT_DEEPSPEED = {"zero": ("0",), "precision": ("fp32",), "offload": ("none",)}
OFFLOADED = ("optimizer to cpu", "optimizer to nvme")

COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        name="data parallelism",
        covers={"tensor": ("1",), "pipeline": ("1",), "virtual_stages": ("1",)} | ZERO_WITHOUT_OFFLOAD,
        proof=ZERO,
    ),
    Combination(
        name="tensor parallelism",
        covers={"tensor": ("> 1",), "pipeline": ("1",), "virtual_stages": ("1",)} | ZERO_WITHOUT_OFFLOAD,
        proof=SPREAD,
    ),
    Combination(
        name="pipeline parallelism (1F1B)",
        covers={"tensor": ("1",), "pipeline": ("> 1",), "virtual_stages": ("1",)} | ZERO_WITHOUT_OFFLOAD,
        proof=SPREAD,
    ),
    Combination(
        name="tensor x pipeline parallelism (1F1B)",
        covers={"tensor": ("> 1",), "pipeline": ("> 1",), "virtual_stages": ("1",)} | ZERO_WITHOUT_OFFLOAD,
        proof=SPREAD,
    ),
    Combination(
        name="pipeline parallelism (interleaved 1F1B)",
        covers={"pipeline": ("> 1",), "virtual_stages": ("> 1",)} | ZERO_WITHOUT_OFFLOAD,
        proof=SPREAD,
    ),
    Combination(
        name="without DeepSpeed",
        covers={"pipeline": ("1",), "virtual_stages": ("1",)} | WITHOUT_DEEPSPEED,
        proof=SPREAD,
    ),
    Combination(
        name="without DeepSpeed, pipeline parallelism",
        covers={"pipeline": ("> 1",)} | WITHOUT_DEEPSPEED,
        proof=SPREAD,
    ),
    Combination(
        name="optimizer offload",
        covers={"pipeline": ("1",), "virtual_stages": ("1",), "zero": ("2", "3"), "offload": ("optimizer to cpu",)},
        proof=OFFLOAD,
    ),
    Combination(
        name="ZeRO-0 in bf16",
        covers={"zero": ("0",), "precision": ("bf16",)},
        reason=(
            "every rank would keep a whole fp32 copy of the weights and the whole optimizer state, which ZeRO-1 "
            "partitions over the data-parallel ranks at no extra communication"
        ),
        fix="add --parallel.zero_stage 1, or --train.precision fp32",
    ),
    Combination(
        name="virtual stages without a pipeline",
        covers={"pipeline": ("1",), "virtual_stages": ("> 1",)},
        reason="virtual stages interleave on the ranks of a pipeline, and here one rank holds all layers",
        fix="add --parallel.virtual_stages 1, or --parallel.pipeline 2",
    ),
    Combination(
        name="optimizer offload with whole gradients",
        covers={"zero": ("0", "1"), "offload": OFFLOADED},
        reason=(
            "state moves to the host together with the gradient partition of a data-parallel rank; ZeRO-0 keeps its "
            "state on the device, and with ZeRO-1, where gradients stay whole, offloading is not proven"
        ),
        fix="add --parallel.zero_stage 2, or set the device to none",
    ),
    Combination(
        name="optimizer offload with a pipeline",
        covers={"pipeline": ("> 1",), "offload": OFFLOADED},
        reason=(
            "DeepSpeed copies a gradient to the host in the backward pass of a step's last micro-batch, which every "
            "pipeline stage runs at another time under the schedule; that is not proven"
        ),
        fix="add --parallel.pipeline 1, or set the device to none (more data-parallel ranks make partitions smaller)",
    ),
    Combination(
        name="optimizer offload to NVMe",
        covers={"offload": ("optimizer to nvme",)},
        reason="optimizer state is offloaded to the host's memory only",
        fix="set the device to cpu or none",
    ),
    Combination(
        name="weight offload",
        covers={"offload": ("weights",)},
        reason=(
            "each weight is gathered once per step and stays whole until the step ends, so that offloading it in "
            "between saves next to nothing"
        ),
        fix=(
            "delete offload_param (more data-parallel ranks make partitions smaller), or raise parallel.tensor or "
            "parallel.pipeline"
        ),
    ),
)


def refusals(run: RunConfig) -> list[str]:
    """Return why this combination is refused, a sentence each; empty where it is supported."""
    found = [row.refusal(run) for row in COMBINATIONS if row.reason and row.matches(run)]
    if not found and not any(row.proof and row.matches(run) for row in COMBINATIONS):
        settings = ", ".join(axis.setting(run) for axis in AXES.values())
        supported = "; ".join(row.name for row in COMBINATIONS if row.proof)
        found.append(f"{settings}: this combination is in no row of what is supported: {supported}.")
    return found


AUDIO_EXPORT_REFUSAL = "neither the exported modelling file nor the official release has an audio encoder"
"""Why to-hf and to-official refuse a model with model.audio."""

AUDIO_PROOF = "tests/distributed/test_two_modalities.py"
"""Proof that a model with images and audio equals one process under every kind of parallelism."""

HEAD = """\
# What works together

This page is generated from the table that also accepts or refuses a run (`aki_megatron/config/combinations.py`):

    python -m aki_megatron.config.combinations > docs/combinations.md

How to read it: a run has one value in every column. It is accepted when a row of the first table covers all its values
and no row of the second table does. "any" means every value of the column:

| column | decided by | values |
|---|---|---|
"""

KEYS = {
    "tensor": "`parallel.tensor`",
    "pipeline": "`parallel.pipeline`",
    "virtual_stages": "`parallel.virtual_stages`",
    "zero": "`parallel.zero_stage`",
    "precision": "`train.precision`",
    "recompute": "`parallel.recompute`",
    "offload": "`--ds_config`: `zero_optimization.offload_optimizer` and `offload_param`",
    "rule": "`attention.rule`",
}

BESIDE = """\
| data | number of ranks / (tensor x pipeline) | any size |
| packing | `data.packing.enabled`: several samples in one sequence, each a segment of its own | any |
| what trains | `trainable`, and per phase `data.phases` ([training_parts.md](training_parts.md)) | any |
| checkpoints | `checkpoint.exclude_frozen_parameters`: whole, or without what never trains \
([training_parts.md](training_parts.md)) | any |
| validation | `validation.interval`: losses and answers during training ([validation.md](validation.md)) | any |

Every part that trains or does not, low-rank adapters and stages of which nothing trains are proven in
[tests/distributed/test_trainable.py](../tests/distributed/test_trainable.py), changes from phase to phase in
[tests/distributed/test_training_phases.py](../tests/distributed/test_training_phases.py), and that checkpoints without
frozen weights resume to the bits of whole ones in
[tests/distributed/test_frozen_checkpoints.py](../tests/distributed/test_frozen_checkpoints.py).

Data parallelism is in every row, at any size that divides `train.global_batch_size`. Packed sequences are part of the
batches with which the rows are proven. Validation goes with every row: its losses and answers equal those of one
process, and training with it is bit-equal to training without it ({proof}).

## Supported

Proven means: losses, gradient norms and every final weight equal those of one process, in fp32.

"""

REFUSED_HEAD = """
## Refused

A run that one of these rows covers ends before it starts, with the reason and what to change.

"""

FOOT = """
Sizes have rules of their own, which do not depend on the combination: `parallel.tensor` divides the decoder's
`num_heads`, `num_kv_heads`, `intermediate_size` and `padded_vocab_size`; `parallel.pipeline` x
`parallel.virtual_stages` is at most the number of decoder layers; `train.global_batch_size` is a multiple of the
data-parallel size.

## Audio

`model.audio` (docs/modalities.md) goes with every row; both modalities in packed sequences, and micro-batches without
one of them, are proven by {audio_proof}.
A model with audio is not exported: {audio_export}.

## Attention rules

Who may attend to whom is chosen by `attention.rule` (`aki_megatron/config/attention.py`). Where a rule looks ahead at
the prompt, captions (`data.kind: captions`) without `data.caption_prefix` and `order: text_first` are refused, because
the text is supervised or precedes the image.

"""


def _rule_rows() -> list[list[str]]:
    return [["rule", "who sees whom", "looks ahead at", "options", "position ids", "exported"]] + [
        [
            f"`{name}`",
            rule.summary,
            {"none": "nothing", "image": "its image", "prompt": "the prompt of its turn"}[rule.look_ahead],
            ", ".join(f"`{option}`" for option in rule.options) or "none",
            rule.position_ids,
            f"no: {rule.export_refusal}"
            if rule.export_refusal
            else "yes" + ", with default options" * bool(rule.options),
        ]
        for name, rule in ATTENTION_RULES.items()
    ]


def _values(row: Combination) -> list[str]:
    return [", ".join(row.covers[name]) if name in row.covers else "any" for name in AXES]


def page() -> str:
    """Return the text of docs/combinations.md."""
    headings = [axis.heading for axis in AXES.values()]
    axes = "".join(f"| {axis.heading} | {KEYS[name]} | {', '.join(axis.values)} |\n" for name, axis in AXES.items())
    supported = [["", *headings, "data", "packing", "proven by"]] + [
        [row.name, *_values(row), "any", "any", link(row.proof)] for row in COMBINATIONS if row.proof
    ]
    refused = [["", *headings, "reason", "fix"]] + [
        [row.name, *_values(row), row.reason, row.fix] for row in COMBINATIONS if row.reason
    ]
    return (
        HEAD
        + axes
        + BESIDE.format(proof=link(VALIDATION))
        + table(supported)
        + REFUSED_HEAD
        + table(refused)
        + FOOT.format(audio_proof=link(AUDIO_PROOF), audio_export=AUDIO_EXPORT_REFUSAL)
        + table(_rule_rows())
        + deepspeed_section()
    )


if __name__ == "__main__":
    print(page(), end="")
