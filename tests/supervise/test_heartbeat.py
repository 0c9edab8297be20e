"""The straggler among heartbeats."""

from aki_megatron.supervise.heartbeat import Heartbeat, straggler


def test_the_straggler_by_steps_then_waiting_then_phases_then_time() -> None:
    def beat(rank: int, step: int, since: float, num_phases: int = 3, collective: str = "") -> Heartbeat:
        return Heartbeat(rank, step, "forward 0", since, num_phases, collective=collective)

    assert straggler([beat(0, 5, 1.0), beat(1, 4, 9.0, 8, "all_reduce")]).rank == 1
    assert straggler([beat(0, 5, 1.0, 2, "all_reduce"), beat(1, 5, 9.0)]).rank == 1
    assert straggler([beat(0, 5, 1.0, 4), beat(1, 5, 9.0)]).rank == 1
    assert straggler([beat(0, 5, 3.0), beat(1, 5, 2.0), beat(2, 5, 9.0)]).rank == 1
