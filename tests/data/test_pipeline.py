"""What a run reads follows from its configuration: weights of the sources, phases, seeds."""

from collections import Counter
from pathlib import Path

import pytest

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.data.pipeline import phase_seed, run_phases, source_weights
from aki_megatron.data.sample_stream import Source

ROOT = Path(__file__).resolve().parents[2]


def demo(*flags: str) -> RunConfig:
    config = ROOT / "configs/demo/sft.yaml"
    return load_run(["--config", str(config), *flags], default_config=config, prog="sft.py", description="")


SIZES = {"vqav2": 40, "vsr": 10, "aokvqa": 20, "refcoco": 30}


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        ("weights", {"vqav2": 0.65, "vsr": 0.05, "aokvqa": 0.05, "refcoco": 0.25}),
        ("uniform", dict.fromkeys(SIZES, 1.0)),
        ("proportional", {name: float(size) for name, size in SIZES.items()}),
    ],
)
def test_every_way_of_mixing(mixing: str, expected: dict[str, float]) -> None:
    sources = {name: Source(range(size)) for name, size in SIZES.items()}
    assert source_weights(demo("--data.mixing", mixing).data, sources) == expected


def test_a_run_without_phases_is_one() -> None:
    (only,) = run_phases(demo())
    assert (only.steps, only.sources, only.order) == (1600, (), "image_first")


DUAL = "{{steps: {}, order: text_first}}, {{steps: {}}}"


def test_dual_order_and_its_variants_are_phases() -> None:
    """Text-first then image-first in one run, or one of the two orders alone: the papers' DOT and its ablations."""
    causal = ("--attention.rule", "causal")
    tandem = run_phases(demo(*causal, "--data.phases", f"[{DUAL.format(800, 800)}]"))
    assert [(phase.order, phase.steps) for phase in tandem] == [("text_first", 800), ("image_first", 800)]
    alone = run_phases(demo(*causal, "--data.phases", "[{steps: 1600, order: text_first}]"))
    assert [phase.order for phase in alone] == ["text_first"]


def test_every_phase_has_its_own_seed_and_the_first_has_the_runs() -> None:
    seeds = Counter(phase_seed(seed, phase) for seed in (0, 1) for phase in range(3))
    assert max(seeds.values()) == 1 and phase_seed(7, 0) == 7
