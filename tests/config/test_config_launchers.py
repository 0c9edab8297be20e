"""Launchers as a user starts them: help in a moment, one message and exit code 2 for a mistake, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aki_megatron.config.flags import UNSET
from aki_megatron.config.load import FLAGS
from aki_megatron.config.run import RunConfig
from aki_megatron.config.start import USER_ERROR, refuse, start
from aki_megatron.errors import ConfigError
from aki_megatron.supervise.signals import StopSignals

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("pretrain", "sft")


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "RANK"}
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=clean | environ, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_teaches(name: str) -> None:
    done = run(f"launcher/{name}.py", "--help", COLUMNS="110")
    assert done.returncode == 0, done.stderr
    for words in (
        f"deepspeed --num_gpus 8 launcher/{name}.py --ds_config configs/zero3.json",
        f"torchrun --nproc_per_node 8 launcher/{name}.py --config configs/aki4b/{name}.yaml",
        f"python launcher/{name}.py --config configs/demo/{name}.yaml",
        "--config FILE",
        "--ds_config FILE",
        "Samples per optimizer step over all ranks;",
        "(default: 192)" if name == "pretrain" else "(default: 8)",
        "bf16|fp32",
    ):
        assert words in done.stdout, words
    for key in FLAGS:
        assert f"--{key} " in done.stdout, key
    assert UNSET not in done.stdout


def test_help_shows_the_values_of_the_config_at_hand() -> None:
    done = run("launcher/sft.py", "--config", "configs/demo/sft.yaml", "--help", COLUMNS="110")
    assert done.returncode == 0
    assert "(default: runs/demo/sft)" in done.stdout
    assert "those of configs/demo/sft.yaml" in " ".join(done.stdout.split())


def test_a_mistake_is_one_message_without_traceback() -> None:
    done = run("launcher/sft.py", "--train.step", "5")
    assert done.returncode == USER_ERROR
    assert done.stdout == ""
    assert done.stderr == "error: command line: unknown flag --train.step; did you mean --train.steps?\n"


def test_parsing_needs_no_torch() -> None:
    code = "import sys, aki_megatron.config.start; sys.exit(any(m in sys.modules for m in ('torch', 'deepspeed')))"
    assert run("-c", code).returncode == 0


@pytest.mark.parametrize(
    ("environ", "first"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "3"}, False),
        ({"SLURM_PROCID": "1"}, False),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),
    ],
)
def test_rank_0_speaks_first(
    environ: dict[str, str], first: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_signals, waited = StopSignals(), list[float]()
    monkeypatch.setattr(stop_signals, "wait", waited.append)
    assert refuse(ConfigError("no"), environ, stop_signals, grace_seconds=3.0) == USER_ERROR
    said = capsys.readouterr().err
    assert said == "error: no\n" if first else said.startswith("error on rank ")
    assert waited == ([] if first else [3.0])


def test_a_rank_that_is_told_to_end_leaves_the_word_to_rank_0(capsys: pytest.CaptureFixture[str]) -> None:
    stop_signals = StopSignals()
    stop_signals.again()  # SIGTERM has come
    assert refuse(ConfigError("no"), {"RANK": "1"}, stop_signals, grace_seconds=600.0) == USER_ERROR
    assert capsys.readouterr().err == ""


def test_start_hands_over_the_run() -> None:
    seen: list[RunConfig] = []

    def train(config: RunConfig) -> int:
        seen.append(config)
        return 7

    code = start(
        ["--train.steps", "60", "--local_rank=0"],
        {},
        StopSignals(),
        default_config=ROOT / "configs/demo/sft.yaml",
        prog="launcher/sft.py",
        description="A.",
        train=train,
    )
    assert code == 7
    assert [config.train.steps for config in seen] == [60]
