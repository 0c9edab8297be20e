"""A rank that stops stepping is named, the stacks of all ranks are written, and the run ends by itself."""

import re
import uuid

import pytest
from launchers import launcher_command
from small_demo import DemoWorkspace
from test_rank_failure import FAILING_SFT, processes_with

from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEP = 5


@pytest.mark.parametrize(
    ("how", "rank", "reason"),
    [
        ("sleep", 1, r"rank 1 on \S+ is the straggler: in 'waiting for data' for \d+ s after step 4\n"),
        (
            "stop",
            0,
            r"rank 0 is unresponsive \(suspended\? machine down\?\); rank 0 on \S+ was last seen in '.*' after step \d",
        ),
    ],
)
def test_a_rank_that_stops_stepping(demo: DemoWorkspace, how: str, rank: int, reason: str) -> None:
    mark = f"AKI_TEST_MARK={uuid.uuid4()}"
    paths = RunPaths(demo.folder / f"hanging_{how}")
    changes = {"AKI_TEST_FAILS": f"{rank}:{STEP}:{how}", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
    environment = demo.environment | changes | dict([mark.split("=")])
    flags = [
        *demo.sft_flags(paths.path.name, steps=50),
        "--train.global_batch_size",
        "4",
        "--watch.step_timeout",
        "8",
    ]
    command = launcher_command("torchrun", 2)
    result = DemoWorkspace(demo.folder, environment).run(*command, FAILING_SFT, *flags, ok=False)

    assert result.returncode != 0
    assert processes_with(mark) == [], "processes left behind"
    (message,) = re.findall(r"^error.*\n.*", result.stderr, flags=re.MULTILINE)
    assert re.search(rf"error on rank {rank}: hang: no step for \d+ s \(timeout: \d+ s\); {reason}", message + "\n")
    assert f"{paths.logs}/hang_rank_*.txt" in result.stderr
    (event,) = read_events(paths)
    assert event["kind"] == "hang" and event["step"] == STEP - 1 and f"rank {rank}" in event["text"]
    answered = [path.name for path in paths.logs.glob("hang_rank_*.txt") if path.stat().st_size]
    assert sorted(answered) == (["hang_rank_0.txt", "hang_rank_1.txt"] if how == "sleep" else ["hang_rank_1.txt"])
    stacks = paths.hang_stacks(1).read_text()
    assert "sleep_in_the_loader" in stacks if how == "sleep" else "pipeline.py" in stacks
    assert [line["step"] for line in read_metrics(paths.metrics)] == list(range(1, STEP))
    (attempt,) = read_attempts(paths)
    if how == "sleep":  # a stopped rank 0 cannot write how the attempt ended
        assert attempt.end == "failed" and "hang" in attempt.reason
