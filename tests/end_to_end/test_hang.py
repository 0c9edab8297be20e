"""A rank that stops stepping is named, the stacks of all ranks are written, and the run ends by itself."""

import re
import uuid

import pytest
from launchers import launcher_command
from small_demo import World
from test_rank_failure import FAILING_SFT, processes_with

from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.run_paths import RunPaths, read_metrics

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEP = 5


@pytest.mark.parametrize(
    ("how", "rank", "said"),
    [
        ("sleep", 1, r"rank 1 on \S+ lags: in 'waits for data' for \d+ s after step 4\n"),
        (
            "stop",
            0,
            r"rank 0 is silent \(stopped\? machine gone\?\); rank 0 on \S+ was last seen in '.*' after step \d",
        ),
    ],
)
def test_a_rank_that_stops_stepping(world: World, how: str, rank: int, said: str) -> None:
    mark = f"AKI_TEST_MARK={uuid.uuid4()}"
    folder = RunPaths(world.folder / f"hanging_{how}")
    changes = {"AKI_TEST_FAILS": f"{rank}:{STEP}:{how}", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
    environment = world.environment | changes | dict([mark.split("=")])
    flags = [
        *world.sft_flags(folder.path.name, steps=50),
        "--train.global_batch_size",
        "4",
        "--watch.step_timeout",
        "8",
    ]
    command = launcher_command("torchrun", 2)
    result = World(world.folder, environment).run(*command, FAILING_SFT, *flags, ok=False)

    assert result.returncode != 0
    assert processes_with(mark) == [], "processes left behind"
    (message,) = re.findall(r"^error.*\n.*", result.stderr, flags=re.MULTILINE)
    assert re.search(rf"error on rank {rank}: hang: no step for \d+ s \(8 s are allowed\); {said}", message + "\n")
    assert f"{folder.logs}/hang_rank_*.txt" in result.stderr
    (event,) = read_events(folder)
    assert event["kind"] == "hang" and event["step"] == STEP - 1 and f"rank {rank}" in event["text"]
    answered = [path.name for path in folder.logs.glob("hang_rank_*.txt") if path.stat().st_size]
    assert sorted(answered) == (["hang_rank_0.txt", "hang_rank_1.txt"] if how == "sleep" else ["hang_rank_1.txt"])
    stacks = folder.hang_stacks(1).read_text()
    assert "sleep_in_the_loader" in stacks if how == "sleep" else "pipeline.py" in stacks
    assert [line["step"] for line in read_metrics(folder.metrics)] == list(range(1, STEP))
    (attempt,) = read_attempts(folder)
    if how == "sleep":  # a stopped rank 0 cannot write how the attempt ended
        assert attempt.end == "failed" and "hang" in attempt.reason
