"""Save under one layout, resume under another: the next steps are those of an undisturbed run."""

import pytest
from tiny import STEPS, Trained, difference, outcome, take_steps, tiny_engine, train_plainly

from aki_megatron.checkpoint.saver import Saver, read_weights
from aki_megatron.engine import logical

pytestmark = pytest.mark.distributed
SAVED_AFTER = 3


def train_and_save(topology, zero_stage, precision, folder, zero_settings) -> Trained:
    """All steps; saved in the middle."""
    engine = tiny_engine(topology, zero_stage, precision, **zero_settings)
    reports = take_steps(engine, topology, range(SAVED_AFTER))
    Saver(folder, keep_last=1).save(SAVED_AFTER, engine.state(), {"step": SAVED_AFTER})
    reports += take_steps(engine, topology, range(SAVED_AFTER, STEPS))
    return outcome(engine, reports[SAVED_AFTER:])


def load_and_train(topology, zero_stage, precision, folder, zero_settings) -> Trained:
    engine = tiny_engine(topology, zero_stage, precision, **zero_settings)
    # away from the initial weights and moments, so that whatever is not loaded shows
    take_steps(engine, topology, [4])
    saver = Saver(folder, keep_last=1)
    tensors = engine.state()
    extra = saver.load(saver.latest(), tensors)
    engine.load_state(tensors)
    assert extra == {"step": SAVED_AFTER}
    return outcome(engine, take_steps(engine, topology, range(SAVED_AFTER, STEPS)))


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """Saved on 4 ranks by ZeRO-3."""
    folder = tmp_path_factory.mktemp("resume")
    undisturbed = pool.run(4, train_and_save, 3, "fp32", folder, {})[0]
    return folder, undisturbed


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3), (4, 3)])
def test_resume_under_another_layout(run_on, saved, ranks, zero_stage):
    folder, undisturbed = saved
    for got in run_on(ranks, load_and_train, zero_stage, "fp32", folder, {}):
        assert difference(got, undisturbed) <= 1e-5


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_save_by_other_stages(run_on, tmp_path, zero_stage):
    undisturbed = run_on(2, train_and_save, zero_stage, "fp32", tmp_path, {})[0]
    # many small sub-groups: the optimizer's state lies in many flat tensors
    for got in run_on(2, load_and_train, 3, "fp32", tmp_path, {"sub_group_size": 300}):
        assert difference(got, undisturbed) <= 1e-5


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_resume_in_bf16_keeps_master_weights(run_on, tmp_path, zero_stage):
    undisturbed = run_on(2, train_and_save, zero_stage, "bf16", tmp_path, {})[0]
    for got in run_on(2, load_and_train, zero_stage, "bf16", tmp_path, {}):
        assert difference(got, undisturbed) == 0.0


def test_the_saved_run_is_the_plain_run(saved):
    folder, undisturbed = saved
    plain = train_plainly()
    assert max(abs(a - b) for a, b in zip(undisturbed.losses, plain.losses[SAVED_AFTER:], strict=True)) <= 1e-5
    weights = read_weights(folder)
    expected = train_plainly(range(SAVED_AFTER)).weights
    assert weights.keys() == expected.keys()
    assert max(float((weights[name] - expected[name]).abs().max()) for name in weights) <= 1e-5


def names_and_sizes(topology) -> dict[str, tuple[int, ...]]:
    state = tiny_engine(topology, 3).state()
    local = {name: getattr(tensor, "_local_tensor", tensor).numel() for name, tensor in state.items()}
    whole = {name: tensor.numel() for name, tensor in state.items()}
    return {"local": sum(local.values()), "whole": sum(whole.values()), "names": sorted(state)}


def test_state_is_logical_and_sharded(run_on):
    one = run_on(1, names_and_sizes)[0]
    shares = run_on(4, names_and_sizes)
    assert all(share["names"] == one["names"] and share["whole"] == one["whole"] for share in shares)
    assert sum(share["local"] for share in shares) == one["whole"] + 3, "each row on one rank, the step counter on all"
    assert logical.STEP in one["names"]
    assert "weight.front.vision.norm.weight" in one["names"]
    assert "exp_avg.front.vision.norm.weight" not in one["names"], "frozen: it has no moments"
