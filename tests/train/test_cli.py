"""Launchers as a user starts them: help in a moment, one message and exit code 2 for a mistake, no traceback."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from aki_megatron.config.flags import UNSET
from aki_megatron.config.load import FLAGS
from aki_megatron.config.run import RunConfig
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.supervise.exit_codes import USER_ERROR
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.train import cli
from aki_megatron.train.cli import report_user_error, run_launcher

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("pretrain", "sft")


@pytest.fixture(autouse=True)
def without_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave signals and forks of this process alone: other tests share it."""
    monkeypatch.setattr(StopSignals, "listen", lambda stop_signals: None)


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "RANK"}
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=clean | environ, capture_output=True, text=True, timeout=120
    )


def text_of(printed: str) -> str:
    """What --help prints, without its boxes and line breaks."""
    return " ".join("".join(" " if char in "\u2500\u2502" else char for char in printed).split())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_shows_usage_and_every_key(name: str) -> None:
    done = run(f"launcher/{name}.py", "--help", COLUMNS="110")
    assert done.returncode == 0, done.stderr
    for text in (
        f"deepspeed --num_gpus 8 launcher/{name}.py --ds_config configs/zero3.json",
        f"torchrun --nproc_per_node 8 launcher/{name}.py --config configs/aki4b/{name}.yaml",
        f"python launcher/{name}.py --config configs/demo/{name}.yaml",
        "--config FILE",
        "--ds_config FILE",
        "--allow_change KEY[,KEY...]",
        "Samples per optimizer step over all ranks;",
        "(default: 192)" if name == "pretrain" else "(default: 8)",
        "bf16|fp32",
    ):
        assert text in text_of(done.stdout), text
    for key in FLAGS:
        assert f"--{key} " in done.stdout, key
    assert UNSET not in done.stdout


def test_help_shows_the_values_of_the_given_config() -> None:
    done = run("launcher/sft.py", "--config", "configs/demo/sft.yaml", "--help", COLUMNS="110")
    assert done.returncode == 0
    assert "(default: runs/demo/sft)" in text_of(done.stdout)
    assert "those of configs/demo/sft.yaml" in text_of(done.stdout)


def test_help_ends_quietly_where_its_reader_has_ended() -> None:
    """As in ``--help | head -1``; without a signal handler of the whole process, which tests share."""
    before = signal.getsignal(signal.SIGPIPE)
    with pytest.raises(SystemExit) as ended:
        run_launcher("sft", ["--help"], {})
    assert ended.value.code == 0 and signal.getsignal(signal.SIGPIPE) == before
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "launcher/sft.py", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_mistake_is_one_message_without_traceback() -> None:
    done = run("launcher/sft.py", "--train.step", "5")
    assert done.returncode == USER_ERROR
    assert done.stdout == ""
    assert done.stderr == "error: command line: unknown flag --train.step; did you mean --train.steps?\n"


def test_parsing_needs_no_torch() -> None:
    code = (
        "import sys; from aki_megatron.train.cli import run_launcher; code = run_launcher('sft', ['--train.step'], {});"
        "sys.exit(3 if any(m in sys.modules for m in ('torch', 'deepspeed')) else code)"
    )
    assert run("-c", code).returncode == USER_ERROR


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_work_from_a_checkout_that_is_not_installed(name: str, tmp_path: Path) -> None:
    hidden = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
    code = f"{hidden} sys.argv = ['x', '--help']; import runpy;"
    code += f"sys.path = [p for p in sys.path if p not in ('', {str(ROOT)!r})];"
    find = "from importlib.util import find_spec; assert find_spec('aki_megatron') is None;"
    start = f"runpy.run_path({str(ROOT / f'launcher/{name}.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code + find + start], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "--train.steps" in done.stdout, done.stderr


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
def test_rank_0_reports_first(
    environ: dict[str, str], first: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_signals, waited = StopSignals(), list[float]()
    monkeypatch.setattr(stop_signals, "wait", waited.append)
    assert report_user_error(ConfigError("no"), environ, stop_signals, grace_seconds=3.0) == USER_ERROR
    message = capsys.readouterr().err
    assert message == "error: no\n" if first else message.startswith("error on rank ")
    assert waited == ([] if first else [3.0])


def test_a_rank_that_receives_sigterm_leaves_the_report_to_rank_0(capsys: pytest.CaptureFixture[str]) -> None:
    stop_signals = StopSignals()
    stop_signals.is_repeated_sigterm()  # the first SIGTERM arrives
    assert report_user_error(ConfigError("no"), {"RANK": "1"}, stop_signals, grace_seconds=600.0) == USER_ERROR
    assert capsys.readouterr().err == ""


@pytest.fixture
def allowed() -> list[tuple[str, ...]]:
    """The keys that each run may change."""
    return []


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, allowed: list[tuple[str, ...]]) -> list[RunConfig]:
    """The runs that launchers hand over, instead of training them."""
    runs: list[RunConfig] = []

    def main(
        config: RunConfig, environ: Mapping[str, str], stop_signals: StopSignals, allow_change: Sequence[str]
    ) -> int:
        runs.append(config)
        allowed.append(tuple(allow_change))
        if config.data.root == Path("nowhere"):
            raise DataError("no data")
        return 7

    monkeypatch.setitem(sys.modules, "aki_megatron.train.main", SimpleNamespace(main=main))
    monkeypatch.setattr(cli.StopSignals, "listen", lambda self: None)
    return runs


def test_the_run_is_handed_over(trained: list[RunConfig]) -> None:
    argv = ["--config", str(ROOT / "configs/demo/sft.yaml"), "--train.steps", "60", "--local_rank=0"]
    assert run_launcher("sft", argv, {}) == 7
    assert [config.train.steps for config in trained] == [60]


def test_what_may_change_is_handed_over(
    trained: list[RunConfig], allowed: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--allow_change", "train.steps,optimizer.lr", "--train.steps", "60", "--train.steps", "70"]
    argv = ["--config", str(ROOT / "configs/demo/sft.yaml"), *flags]
    assert run_launcher("sft", argv, {"RANK": "0"}) == 7
    assert allowed == [("train.steps", "optimizer.lr")] and trained[0].train.steps == 70
    assert capsys.readouterr().err == 'note: --train.steps is given 2 times; the last one counts: "70"\n'
    assert run_launcher("sft", argv, {"RANK": "1"}) == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "kind"), [("pretrain", "captions"), ("sft", "conversations")])
def test_the_default_run_of_each_launcher(name: str, kind: str, trained: list[RunConfig]) -> None:
    assert run_launcher(name, [], {}) == 7
    assert [config.data.kind for config in trained] == [kind]


def test_a_mistake_that_is_found_before_training(trained: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_launcher("sft", ["--data.root", "nowhere"], {}) == USER_ERROR
    assert capsys.readouterr().err == "error: no data\n"
