"""No DeepSpeed setting that a run may change changes a number: in training, checkpoints, exports, or when resuming.

The settings of a ZeRO stage are varied together. In the eight variants, four in each precision, every two switches meet
in all four combinations. Each precision runs every value of every setting that DeepSpeed reads.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import whole_state
from tiny import Setting, Trained, difference, take_steps, tiny_engine, together
from torch import Tensor

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.config.deepspeed_keys import ALIASES, OFFLOAD_PROOF, PROOF, PROVEN
from aki_megatron.engine import global_state
from aki_megatron.engine.pipeline import PipelineEngine
from aki_megatron.parallel.topology import Topology

pytestmark = pytest.mark.distributed
VARIANTS = {"fp32": range(0, 4), "bf16": range(4, 8)}
SAVED_AFTER, LAST = 1, 3
Settings = dict[str, Any]

PUBLISHED: dict[int, Settings] = {
    2: {
        "zero_optimization.allgather_partitions": True,
        "zero_optimization.allgather_bucket_size": 2 * 10**8,
        "zero_optimization.overlap_comm": True,
        "zero_optimization.reduce_scatter": True,
        "zero_optimization.reduce_bucket_size": 2 * 10**8,
        "zero_optimization.contiguous_gradients": True,
    },
    3: {
        "zero_optimization.overlap_comm": True,
        "zero_optimization.contiguous_gradients": True,
        "zero_optimization.sub_group_size": 10**9,
        "zero_optimization.stage3_max_live_parameters": 10**9,
        "zero_optimization.stage3_max_reuse_distance": 10**9,
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": True,
    },
}
"""ZeRO stage -> what Hugging Face's ds_config_zero2.json and ds_config_zero3.json set, but for "auto"."""


def variant(zero_stage: int, number: int) -> Settings:
    """Return variant 0 ... 7: names and values for this ZeRO stage, each setting in one of its spellings."""
    settings: Settings = {}
    switches = 0
    for name, proven in PROVEN.items():
        if proven.proof != PROOF or zero_stage not in proven.zero_stages:
            continue
        if name in ALIASES or name in ALIASES.values():
            # bit 0 chooses the spelling, bit 1 the value, so that both values occur in both spellings
            if (name in ALIASES) is bool(number & 1):
                settings[name] = proven.tested[number >> 1 & 1]
        elif proven.tested == (False, True):
            # columns of an orthogonal array: the parity of different bits for each switch
            switches += 1
            settings[name] = bool((number & switches).bit_count() & 1)
        else:
            settings[name] = proven.tested[number % len(proven.tested)]
    assert switches <= 7
    return settings


def with_settings(setting: Setting, settings: Settings) -> Setting:
    zero = [(name.removeprefix("zero_optimization."), value) for name, value in settings.items() if "." in name]
    top = [(name, value) for name, value in settings.items() if "." not in name]
    return Setting(setting.zero_stage, setting.precision, zero_settings=tuple(zero), deepspeed=tuple(top))


def test_every_accepted_value_is_proven():
    """The others are proven by the file that the table names."""
    for name, proven in PROVEN.items():
        if proven.proof == OFFLOAD_PROOF:
            assert name.startswith("zero_optimization.offload_optimizer.")
            continue
        for zero_stage in proven.zero_stages:
            values = {variant(zero_stage, number).get(name) for numbers in VARIANTS.values() for number in numbers}
            assert values - {None} == set(proven.tested), name


def load(engine: PipelineEngine, folder: Path) -> None:
    """Load the newest checkpoint of a folder, and compare what the engine then holds and exports with it."""
    checkpointer = Checkpointer(folder, keep_last=1)
    tensors = engine.state_dict()
    checkpointer.load(checkpointer.latest(), tensors)
    engine.load_state_dict(tensors)
    loaded = {name: global_state.gather(tensor).clone() for name, tensor in tensors.items()}
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in whole_state(engine).items())
    check_export(engine, loaded)


def check_export(engine: PipelineEngine, state: dict[str, Tensor]) -> None:
    for name, weight in engine.named_weights():
        assert torch.equal(weight, state[global_state.key(global_state.WEIGHT, name)]), name


def save(engine: PipelineEngine, folder: Path) -> None:
    Checkpointer(folder, keep_last=1).save(LAST, engine.state_dict(), {})


def save_start(topology: Topology, setting: Setting, folder: Path) -> None:
    engine = tiny_engine(topology, setting)
    take_steps(engine, topology, range(SAVED_AFTER))
    save(engine, folder)


@pytest.fixture(scope="module", params=VARIANTS)
def start(request, pool, tmp_path_factory) -> tuple[str, Path]:
    """A precision, and the checkpoint of a pipeline from which all its runs start."""
    folder = tmp_path_factory.mktemp("settings")
    pool.run(2, save_start, Setting(2, request.param), folder, pipeline=2)
    return request.param, folder


def train(topology: Topology, setting: Setting, start_folder: Path, out: Path) -> Trained:
    """Resume, train, save."""
    engine = tiny_engine(topology, setting)
    load(engine, start_folder)
    reports = take_steps(engine, topology, range(SAVED_AFTER, LAST))
    state = whole_state(engine)
    check_export(engine, state)
    save(engine, out)
    return Trained([report.loss for report in reports], [report.grad_norm for report in reports], state)


def resume(topology: Topology, setting: Setting, folder: Path) -> Trained:
    engine = tiny_engine(topology, setting)
    load(engine, folder)
    reports = take_steps(engine, topology, [LAST])
    return Trained([report.loss for report in reports], [report.grad_norm for report in reports], whole_state(engine))


def train_all(topology: Topology, settings: list[Setting], start_folder: Path, folder: Path) -> list[Trained]:
    return [train(topology, setting, start_folder, folder / str(number)) for number, setting in enumerate(settings)]


def resume_all(topology: Topology, setting: Setting, folders: list[Path]) -> list[Trained]:
    return [resume(topology, setting, folder) for folder in folders]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_settings_change_no_number(pool, tmp_path, start, zero_stage):
    """The first of the runs has DeepSpeed's defaults.

    Their states are equal bit for bit, so only one of those with other settings is resumed on another layout.
    """
    precision, start_folder = start
    settings = [{}, *(variant(zero_stage, number) for number in VARIANTS[precision])]
    settings += [PUBLISHED[zero_stage]] if zero_stage in PUBLISHED else []
    runs = [with_settings(Setting(zero_stage, precision), one) for one in settings]
    results = pool.run(2, train_all, runs, start_folder, tmp_path)
    first, *others = [together(trained) for trained in zip(*results, strict=True)]
    for one, trained in zip(settings[1:], others, strict=True):
        assert difference(trained, first) == 0.0, one
    other_layout = Setting(zero_stage % 3 + 1, precision)
    results = pool.run(2, resume_all, other_layout, [tmp_path / "0", tmp_path / str(len(others))], pipeline=2)
    default, changed = [together(resumed) for resumed in zip(*results, strict=True)]
    assert difference(changed, default) == 0.0
