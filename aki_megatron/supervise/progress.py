"""Track the step and phase of this rank, and how long a step may take."""

import time
from collections import deque
from statistics import median

from aki_megatron.config.run import WatchConfig

MEDIAN_STEPS = 50
"""Steps in the median duration."""

STARTING = "starting"
SAVING = "saving a checkpoint"
ROLLING_BACK = "rolling back to a checkpoint"
FINISHING = "finishing"
CHANGING_PHASE = "changing what trains"
VALIDATING = "validating"
"""Between the rounds of a validation, each of which may last as long as a step."""

SLOW_PHASES = {STARTING, SAVING, ROLLING_BACK, FINISHING, CHANGING_PHASE, VALIDATING}
"""Phases that may last watch.init_timeout."""


class ProgressTracker:
    """Progress of this rank: the main thread writes it, the watchdog's thread reads it."""

    def __init__(self, watch: WatchConfig) -> None:
        self._watch = watch
        self._durations: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._in_first_step, self._in_slow_phase = True, False
        self.step = 0
        """Optimizer steps done."""
        self.num_phases = 0
        """Phases entered since the last step."""
        self.set_phase(STARTING)

    def set_phase(self, phase: str) -> None:
        """Enter a phase: what this rank does from now on. Cheap; called several times per micro-batch."""
        slow = phase in SLOW_PHASES
        if slow or self._in_slow_phase:  # slow phases do not count as part of a step
            self._step_began = time.monotonic()
        self._in_slow_phase = slow
        self.num_phases += 1
        self.phase = (phase, time.time())  # a single assignment, because another thread reads it

    def add_grace(self, seconds: float) -> None:
        """Allow ``seconds`` more: the process was suspended for that long, and probably all others too."""
        self._step_began += seconds

    def start(self, step: int) -> None:
        """Begin the first step of this attempt, which may take long, after ``step`` steps."""
        self.step, self._in_first_step, self._step_began = step, True, time.monotonic()

    def finish_step(self, step: int) -> None:
        """Note that optimizer step ``step`` is done."""
        now = time.monotonic()
        if not self._in_first_step:
            self._durations.append(now - self._step_began)
        self.step, self.num_phases, self._in_first_step, self._step_began = step, 0, False, now

    def roll_back(self, step: int) -> None:
        """Note that training was rolled back to ``step``."""
        self.step = step

    @property
    def step_seconds(self) -> float:
        """Median duration of recent steps, data and callbacks included; 0 before the second step."""
        return median(self._durations) if self._durations else 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the last step, or since a slow phase began."""
        return time.monotonic() - self._step_began

    @property
    def timeout(self) -> float:
        """Value of ``elapsed`` beyond which the run hangs."""
        if self._in_slow_phase or self._in_first_step:
            return self._watch.init_timeout
        step_timeout = max(self._watch.step_timeout, self._watch.step_timeout_factor * self.step_seconds)
        return min(step_timeout, self._watch.init_timeout)
