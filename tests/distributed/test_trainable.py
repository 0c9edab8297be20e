"""What trains: every table of parts equals one process under every layout, also where a stage trains nothing.

Five optimizer steps with clipping, on the batches of test_parallelism.py.
"""

from functools import cache

import pytest
import torch
from tiny import STEPS, Setting, Trained, difference, outcome, reference_training, take_steps, tiny_engine, together

from aki_megatron.config.trainable import TrainableConfig
from aki_megatron.engine import global_state
from aki_megatron.engine.frozen_stage import FrozenStage
from aki_megatron.model.trainable import is_trained, part_of
from aki_megatron.parallel.topology import Topology

pytestmark = pytest.mark.distributed
LIMIT = 1e-5

ALL_FROZEN = {"resampler": "frozen", "embeddings": "frozen", "decoder": "frozen", "head": "frozen"}
SEPARATE = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TABLES = {
    "encoder": {"vision": "full"},
    "encoder alone": ALL_FROZEN | {"vision": "full"},
    "lora": {"decoder": "lora", "lora": {"rank": 3, "alpha": 6.0}},
    "lora alone, some maps": ALL_FROZEN | {"decoder": "lora", "lora": {"rank": 2, "alpha": 8.0, "targets": SEPARATE}},
    "rates": {
        "vision": {"mode": "full", "lr_factor": 0.1},
        "resampler": {"lr_factor": 2.0, "weight_decay": 0.0},
        "embeddings": {"weight_decay": 0.3},
        "head": {"lr_factor": 0.5},
    },
    "resampler alone": ALL_FROZEN | {"resampler": "full"},
    "head alone": ALL_FROZEN | {"head": "full"},
    "decoder frozen": {"decoder": "frozen"},
}

LAYOUTS: dict[str, tuple[int, int, int, Setting]] = {
    "DP2, ZeRO-3": (2, 1, 1, Setting()),
    "PP4, ZeRO-0": (4, 1, 4, Setting(zero_stage=0)),
    "PP2 x DP2, ZeRO-1": (4, 1, 2, Setting(zero_stage=1)),
    "TP2 x DP2, ZeRO-2, optimizer in host memory": (4, 2, 1, Setting(zero_stage=2, offload=True)),
    "PP2 x 2 virtual stages x DP2, ZeRO-2": (4, 1, 2, Setting(virtual_stages=2, zero_stage=2)),
    "TP2 x PP2 x DP2, ZeRO-3": (8, 2, 2, Setting()),
    "TP2 x PP2 x 2 virtual stages x DP2, ZeRO-3": (8, 2, 2, Setting(virtual_stages=2, recompute=True)),
}
EVERYTHING = ("TP2 x PP2 x DP2, ZeRO-3", "TP2 x PP2 x 2 virtual stages x DP2, ZeRO-3")
CASES = [
    (EVERYTHING[0], "encoder"),
    (EVERYTHING[0], "lora"),
    (EVERYTHING[0], "rates"),
    (EVERYTHING[0], "head alone"),
    (EVERYTHING[1], "encoder"),
    (EVERYTHING[1], "lora alone, some maps"),
    (EVERYTHING[1], "rates"),
    ("DP2, ZeRO-3", "encoder alone"),
    ("PP4, ZeRO-0", "resampler alone"),
    ("PP2 x DP2, ZeRO-1", "decoder frozen"),
    ("TP2 x DP2, ZeRO-2, optimizer in host memory", "lora"),
    ("PP2 x 2 virtual stages x DP2, ZeRO-2", "resampler alone"),
]
"""Every table, every layout; what the stages of a layout share is spread over the tables."""


def with_table(setting: Setting, table: str, **more: object) -> Setting:
    # a limit that some steps exceed and some do not
    clips = {"encoder": 12.0, "rates": 12.0, "lora": 5.0, "encoder alone": 0.35, "head alone": 0.8}
    clip = clips.get(table, 1.0)
    values = {name: getattr(setting, name) for name in setting.__dataclass_fields__}
    return Setting(**values | {"trainable": TrainableConfig.model_validate(TABLES[table]), "clip": clip} | more)


@cache
def plain(table: str, precision: str = "fp32") -> Trained:
    return reference_training(setting=with_table(Setting(), table, precision=precision))


def train(topology: Topology, setting: Setting) -> Trained:
    engine = tiny_engine(topology, setting)
    trained = [name for name, weight in initial(setting).weights.items() if is_trained(name, setting.plan)]
    reports = take_steps(engine, topology, range(STEPS))
    state = engine.state_dict()
    moments = {key.partition(".")[2] for key in state if key.startswith(global_state.MOMENTS)}
    held = {key.removeprefix("weight.") for key in state if key.startswith("weight.")}
    assert moments == held & set(trained), "only what trains has optimizer state"
    return outcome(engine, reports)


@cache
def initial(setting: Setting) -> Trained:
    return reference_training(steps=(), setting=setting)


@pytest.mark.parametrize(("layout", "table"), CASES, ids=[f"{table}: {layout}" for layout, table in CASES])
def test_every_table_equals_one_process(run_on, layout, table):
    ranks, tensor, pipeline, setting = LAYOUTS[layout]
    got = together(run_on(ranks, train, with_table(setting, table), tensor=tensor, pipeline=pipeline))
    assert difference(got, plain(table)) <= LIMIT


@pytest.mark.parametrize("table", TABLES)
def test_the_reference_trains_what_the_table_says(table):
    """Otherwise equality would prove nothing."""
    before, after = reference_training(steps=(), setting=with_table(Setting(), table)).weights, plain(table).weights
    plan = with_table(Setting(), table).plan
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    unused = {"input_embedder.token_embedding.added_tokens"}  # no sample has these tokens, and they do not decay
    assert changed | unused == {name for name in after if is_trained(name, plan)} | unused
    assert {part_of(name) for name in changed} == {name for name, part in plan.parts.items() if part.mode != "frozen"}
    assert any(norm > with_table(Setting(), table).max_grad_norm for norm in plain(table).norms), plain(table).norms


def test_rates_matter():
    table = TABLES["rates"] | {"vision": "full"}
    slow = reference_training(setting=Setting(clip=12.0, trainable=TrainableConfig.model_validate(table)))
    assert difference(slow, plain("rates")) > 100 * LIMIT


def stages_without_training(topology: Topology, setting: Setting) -> tuple[int, list[bool]]:
    engine = tiny_engine(topology, setting)
    take_steps(engine, topology, range(1))
    gradients = [
        parameter.grad is not None
        for stage in engine._stages
        for parameter in stage.module.parameters()
        if not parameter.requires_grad
    ]
    return sum(isinstance(stage, FrozenStage) for stage in engine._stages), gradients


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_frozen_parameters_have_no_gradient(run_on, zero_stage):
    setting = with_table(Setting(zero_stage=zero_stage), "resampler alone")
    (first, one), (last, other) = run_on(2, stages_without_training, setting, pipeline=2)
    assert (first, last) == (0, 1), "the last stage needs no optimizer"
    assert one and other and not any([*one, *other])


@pytest.mark.parametrize(("table", "zero_stage"), [("encoder", 3), ("lora", 2), ("resampler alone", 1)])
def test_bf16_is_as_exact_as_one_process_in_bf16(run_on, table, zero_stage):
    """Masters and gradients are fp32: both deviate alike from fp32."""
    setting = with_table(Setting(zero_stage=zero_stage, precision="bf16"), table)
    got = together(run_on(4, train, setting, tensor=1, pipeline=2))
    exact, rounded = plain(table), plain(table, "bf16")
    assert abs(got.losses[0] - rounded.losses[0]) <= 2e-2
    for name, weight in exact.weights.items():
        assert got.weights[name].dtype == torch.float32
        if not is_trained(name, setting.plan):
            assert torch.equal(got.weights[name], weight), "frozen weights are not rounded"
    ours = max(abs(one - other) for one, other in zip(got.losses, exact.losses, strict=True))
    plain_bf16 = max(abs(one - other) for one, other in zip(rounded.losses, exact.losses, strict=True))
    assert ours <= 2 * plain_bf16 + 1e-2
