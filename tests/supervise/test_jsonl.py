"""Files of JSON lines after a crash in the middle of a write."""

from pathlib import Path

from aki_megatron.supervise.events import read_events, record_event
from aki_megatron.supervise.jsonl import append_line
from aki_megatron.supervise.run_paths import RunPaths


def test_only_a_line_truncated_by_a_crash_is_lost(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    record_event(paths, 3, "loss_spike", "the loss is high")
    with paths.events.open("a") as file:
        file.write('{"time": 1, "st')
    assert len(read_events(paths)) == 1
    record_event(paths, 9, "rollback", "back")
    assert [(event["step"], event["kind"]) for event in read_events(paths)] == [(3, "loss_spike"), (9, "rollback")]
    append_line(paths.attempts, {"a": 1})
    assert paths.attempts.read_text() == '{"a": 1}\n'
