"""Save under one layout, resume under another: the next five steps are those of an undisturbed run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import Setting, Trained, difference, reference_training, take_steps, tiny_engine, together
from torch import Tensor

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.engine import global_state
from aki_megatron.engine.pipeline import PipelineEngine
from aki_megatron.types import StepReport

pytestmark = pytest.mark.distributed
SAVED_AFTER, LAST = 2, 7
LIMIT = 1e-5


@dataclass(frozen=True)
class Layout:
    """A parallel layout; LAYOUTS names them."""

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    zero_stage: int = 3
    virtual_stages: int = 1
    layers_per_stage: tuple[int, ...] = ()

    def setting(self, **more) -> Setting:
        return Setting(
            zero_stage=self.zero_stage,
            virtual_stages=self.virtual_stages,
            layers_per_stage=self.layers_per_stage,
            **more,
        )

    def train(self, pool, function, *args, **more) -> "Trained":
        """What the ranks together hold after ``function``."""
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline}
        return together(pool.run(self.ranks, function, self.setting(**more), *args, **sizes))


LAYOUTS = {
    "1 process, ZeRO-1": Layout(1, zero_stage=1),
    "1 process, no ZeRO": Layout(1, zero_stage=0),
    "DP2, ZeRO-2": Layout(2, zero_stage=2),
    "DP4, ZeRO-3": Layout(4),
    "DP8, ZeRO-1": Layout(8, zero_stage=1),
    "TP4, no ZeRO": Layout(4, tensor=4, zero_stage=0),
    "TP2 x DP2, ZeRO-1": Layout(4, tensor=2, zero_stage=1),
    "PP2, layers 1 + 3, ZeRO-3": Layout(2, pipeline=2, layers_per_stage=(1, 3)),
    "PP2 x 2 virtual stages x DP2, ZeRO-2": Layout(4, pipeline=2, virtual_stages=2, zero_stage=2),
    "PP4, ZeRO-1": Layout(4, pipeline=4, zero_stage=1),
    "TP2 x PP2, ZeRO-3": Layout(4, tensor=2, pipeline=2),
    "TP2 x PP2 x DP2, ZeRO-3": Layout(8, tensor=2, pipeline=2),
    "TP2 x PP2 x DP2, layers 1 + 3, ZeRO-3": Layout(8, tensor=2, pipeline=2, layers_per_stage=(1, 3)),
}
EVERYTHING = "TP2 x PP2 x DP2, ZeRO-3"


def whole_state(engine: PipelineEngine) -> dict[str, Tensor]:
    """Weights, moments and the number of updates that a rank has a part in."""
    return {name: global_state.gather(tensor).clone() for name, tensor in engine.state_dict().items()}


def result(engine: PipelineEngine, reports: Sequence[StepReport]) -> Trained:
    return Trained([r.loss for r in reports], [r.grad_norm for r in reports], whole_state(engine))


def train_and_save(topology, setting: Setting, folder: Path) -> Trained:
    """Run all steps; save asynchronously in the middle."""
    engine = tiny_engine(topology, setting)
    take_steps(engine, topology, range(SAVED_AFTER))
    saver = Checkpointer(folder, keep_last=1, async_save=True, group=topology.new_gloo_group(60))
    state = engine.state_dict()
    copies = {name: global_state.gather(tensor).clone() for name, tensor in state.items()}
    saver.save(SAVED_AFTER, state, {"step": SAVED_AFTER})
    reports = take_steps(engine, topology, range(SAVED_AFTER, LAST))
    saver.wait()
    assert all(torch.equal(global_state.gather(tensor), copies[name]) for name, tensor in state.items()), (
        "later steps must not change it"
    )
    return result(engine, reports)


def load_and_train(topology, setting: Setting, folder: Path) -> Trained:
    engine = tiny_engine(topology, setting)
    # away from the initial weights and moments, so that whatever is not loaded shows
    take_steps(engine, topology, [LAST])
    saver = Checkpointer(folder, keep_last=1)
    tensors = engine.state_dict()
    assert saver.load(saver.latest(), tensors) == {"step": SAVED_AFTER}
    engine.load_state_dict(tensors)
    loaded = {name: global_state.gather(tensor) for name, tensor in tensors.items()}
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in whole_state(engine).items())
    return result(engine, take_steps(engine, topology, range(SAVED_AFTER, LAST)))


def read_state(topology, folder: Path, setting: Setting) -> dict[str, Tensor]:
    """A checkpoint's tensors, read by one process."""
    saver, tensors = Checkpointer(folder, keep_last=1), tiny_engine(topology, setting).state_dict()
    saver.load(saver.latest(), tensors)
    return {name: global_state.gather(tensor).clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """Saved with everything at once."""
    folder = tmp_path_factory.mktemp("resume")
    return folder, LAYOUTS[EVERYTHING].train(pool, train_and_save, folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_saved_with_everything_resumed_under_another_layout(pool, saved, name):
    folder, undisturbed = saved
    assert difference(LAYOUTS[name].train(pool, load_and_train, folder), undisturbed) <= LIMIT


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1 process, no ZeRO", EVERYTHING),
        ("DP2, ZeRO-2", "PP2 x 2 virtual stages x DP2, ZeRO-2"),
        ("TP4, no ZeRO", "PP4, ZeRO-1"),
        ("PP2 x 2 virtual stages x DP2, ZeRO-2", "TP2 x PP2, ZeRO-3"),
        ("PP4, ZeRO-1", "PP2, layers 1 + 3, ZeRO-3"),
    ],
)
def test_saved_in_other_ways(pool, tmp_path, before, after):
    undisturbed = LAYOUTS[before].train(pool, train_and_save, tmp_path)
    assert difference(LAYOUTS[after].train(pool, load_and_train, tmp_path), undisturbed) <= LIMIT


@pytest.mark.parametrize(
    ("before", "after"), [(EVERYTHING, "DP2, ZeRO-2"), ("1 process, ZeRO-1", EVERYTHING), ("PP4, ZeRO-1", EVERYTHING)]
)
def test_tied_tables_on_two_stages(pool, tmp_path, before, after):
    """Both stages save the table under one name, and both load it."""
    undisturbed = LAYOUTS[before].train(pool, train_and_save, tmp_path, tied=True)
    assert "weight.lm_head.base.weight" not in undisturbed.weights
    assert difference(LAYOUTS[after].train(pool, load_and_train, tmp_path, tied=True), undisturbed) <= LIMIT


def test_the_same_numbers_whatever_the_layout_that_saved(pool, tmp_path):
    """Compare checkpoints tensor by tensor."""
    states = []
    for name in ("1 process, ZeRO-1", "PP4, ZeRO-1", EVERYTHING):
        LAYOUTS[name].train(pool, train_and_save, tmp_path / name)
        states += pool.run(1, read_state, tmp_path / name, Setting(zero_stage=1))
    for state in states[1:]:
        assert state.keys() == states[0].keys() and state[global_state.STEP] == SAVED_AFTER
        assert max(float((tensor - states[0][name]).abs().max()) for name, tensor in state.items()) <= LIMIT


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_save_by_other_zero_stages(pool, tmp_path, zero_stage):
    undisturbed = Layout(2, zero_stage=zero_stage).train(pool, train_and_save, tmp_path)
    # many small sub-groups: the optimizer state is distributed over many flat tensors
    again = Layout(2).train(pool, load_and_train, tmp_path, zero_settings={"sub_group_size": 300})
    assert difference(again, undisturbed) <= LIMIT


@pytest.mark.parametrize(
    "layout",
    [Layout(2, zero_stage=1), Layout(2, zero_stage=2), Layout(2), Layout(4, tensor=2, pipeline=2)],
    ids=["DP2, ZeRO-1", "DP2, ZeRO-2", "DP2, ZeRO-3", "TP2 x PP2, ZeRO-3"],
)
def test_resume_in_bf16_keeps_master_weights(pool, tmp_path, layout):
    undisturbed = layout.train(pool, train_and_save, tmp_path, precision="bf16")
    assert difference(layout.train(pool, load_and_train, tmp_path, precision="bf16"), undisturbed) == 0.0


def test_the_saved_run_is_the_plain_run(saved):
    folder, undisturbed = saved
    plain = reference_training(range(LAST))
    assert max(abs(a - b) for a, b in zip(undisturbed.losses, plain.losses[SAVED_AFTER:], strict=True)) <= LIMIT
    source = CheckpointSource(folder)
    weights = {name: source.get(name) for name in source.specs}
    expected = reference_training(range(SAVED_AFTER)).weights
    assert weights.keys() == expected.keys()
    assert max(float((weights[name] - expected[name]).abs().max()) for name in weights) <= LIMIT


def elements_of_state(topology, setting: Setting) -> dict[str, tuple[int, int]]:
    """Name -> elements of this rank's shard, of the full tensor."""
    state = tiny_engine(topology, setting).state_dict()
    return {name: (getattr(t, "_local_tensor", t).numel(), t.numel()) for name, t in state.items()}


def test_state_is_global_and_sharded(run_on):
    one = run_on(1, elements_of_state, Setting())[0]
    states = run_on(8, elements_of_state, Setting(), tensor=2, pipeline=2)
    for name, (_, whole) in one.items():
        found = [state[name] for state in states if name in state]
        assert {size for _, size in found} == {whole}
        holders = 8 if name == global_state.STEP else 1
        assert sum(rows for rows, _ in found) == whole * holders, "each row on one rank, the step counter on all"
    assert {name for state in states for name in state} == set(one)
    assert [name for name in states[0] if name in states[-1]] == [global_state.STEP]
    assert "weight.input_embedder.vision_encoder.norm.weight" in one
    assert "exp_avg.input_embedder.vision_encoder.norm.weight" not in one, "frozen: it has no moments"
