"""Whether the process of another rank is alive."""

import os
import time
from pathlib import Path

from forked import fork

from aki_megatron.supervise.process import RankProcess, is_alive, this_process


def test_is_alive(tmp_path: Path) -> None:
    me = this_process()
    assert is_alive(me)
    assert not is_alive(RankProcess(me.host, me.machine, me.pid, me.start_ticks + 1)), "another process has its pid now"
    assert is_alive(RankProcess("elsewhere", "another boot", 2**22 - 1, 0)), "unknown counts as alive"
    child = fork(lambda: this_process().write(tmp_path / "child"))
    while (written := RankProcess.read(tmp_path / "child")) is None:
        time.sleep(0.01)
    time.sleep(0.1)
    assert not is_alive(written), "it has ended, though its parent has not waited for it"
    os.waitpid(child, 0)
    assert not is_alive(written)
