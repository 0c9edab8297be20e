"""Disturb a run again and again while it trains, starts, saves and stops; count what it loses.

python tools/bench/faults.py                            # 20 rounds: two ranks on the CPU, some minutes
python tools/bench/faults.py --ranks 1 2 4              # resume on other numbers of ranks, too
python tools/bench/faults.py --rounds 100 --seed 1 --json faults.json
python tools/bench/faults.py --launchers torchrun --folder /scratch/faults    # keep the run to look at it

One run of the demo's model, with its defaults: wandb (offline) and TensorBoard on, loader workers, asynchronous
checkpoints; a checkpoint after every step, phases with other sources, packing. Each round starts it with the next
launcher (torchrun, deepspeed, mpirun), waits for a random moment - of its start, of a step, of a save - and sends a
random signal (--help lists them). Then every process of the job must end within a limit, and the run folder is read.
Ranks that outlive their launcher, as docs/cluster.md says of some, are ended by RUN/STOP. At last the run is finished
undisturbed and compared with one that was never disturbed: the samples of all steps, and the losses, which are equal
too as long as the number of ranks is (over hundreds of steps other sums of gradients drift apart).

trained again   steps whose metrics were on disk and that the next start repeated, because no checkpoint had them yet
lost            checkpoints that were complete and are not there any more, as steps that the newest went back
half            checkpoints under their final name that are not what their manifest says
repeats         rounds after which metrics.jsonl had a step twice or lacked one
not stopped     rounds in which ranks that train were asked to stop, and the attempt did not end as "stopped" with all
                its steps saved
hangs           rounds after which a process was left

Exit code: 0 nothing lost, 1 something was (the folder is kept).
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from fault_cases import END_SECONDS, FAULTS, LAUNCHERS, ROOT, Fault, Job, RunState, read_state

from aki_megatron.console import Console, Table
from aki_megatron.errors import UserError
from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.run_comparison import compare_runs

MAX_STEPS_TO_SIGNAL = 4
STEPS_PER_ROUND = 15
"""More than a round trains, so that none is the last of the run: ranks go on while a signal spreads."""

START_SECONDS = 300.0
LAUNCHER_END_SECONDS = 3.0
"""How long ranks that end with their launcher may take."""
TOLERANCE = 1e-6
"""Largest relative difference of a loss between the two runs."""

COUNTS = ("trained_again", "lost", "half", "repeats", "not_stopped", "hangs")
FAULTY = COUNTS[1:]
"""Counts that must be 0; a step is trained again wherever a kill comes before its checkpoint."""


@dataclass
class Round:
    """One start of the run, what was done to it, and what came of it."""

    launcher: str
    ranks: int
    fault: str
    seconds: float = 0.0
    """From the signal to the end of the last process."""
    end: str = ""
    """End of the attempt, as attempts.jsonl has it."""
    trained_again: int = 0
    lost: int = 0
    half: int = 0
    repeats: int = 0
    not_stopped: int = 0
    hangs: int = 0
    text: str = ""


def run_flags(folder: Path, run: str, steps: int) -> list[str]:
    """Return the flags of a run of ``steps`` optimizer steps in ``folder``."""
    first = steps // 2
    return [
        "--config", str(ROOT / "configs/demo/sft.yaml"), "--run.dir", str(folder / run),
        "--data.root", str(folder / "data"), "--data.tokenizer", str(folder / "data/tokenizer"),
        "--train.steps", str(steps), "--optimizer.warmup_steps", "2", "--optimizer.eps", "1e-5",
        "--train.global_batch_size", "4", "--train.micro_batch_size", "1", "--checkpoint.interval", "1",
        "--log.interval", "5", "--log.wandb", "offline", "--init.weights", "null", "--model.decoder.num_layers", "1",
        "--data.packing.enabled", "true", "--data.packing.sequence_length", "192", "--data.packing.buffer_size", "64",
        "--data.phases", f"[{{steps: {first}, sources: [vqav2, vsr]}}, {{steps: {steps - first}}}]",
        "--data.num_workers", "1", "--parallel.zero_stage", "0",
    ]  # fmt: skip


def finish(job: Job, seconds: float) -> None:
    """Wait for a job that nothing disturbs. Raises RuntimeError where it fails or does not end."""
    left = job.wait(seconds)
    job.kill()
    if left or job.launcher.returncode:
        state = "did not end" if left else f"ended with exit code {job.launcher.returncode}"
        raise RuntimeError(f"an undisturbed start {state}; it printed\n{job.log.read_text()[-3000:]}")


def disturb(job: Job, fault: Fault, run: Path, before: RunState, generator: random.Random) -> bool:
    """Wait for a random moment and send the signal; return whether the job had begun to train."""
    target = len(before.steps) + generator.randint(0, MAX_STEPS_TO_SIGNAL)
    delay = generator.random() * 0.3
    if target == len(before.steps):  # while it starts
        delay = generator.random() * 12.0
    end = time.monotonic() + START_SECONDS
    while num_steps(run) < target and job.launcher.poll() is None:
        if time.monotonic() > end:
            raise RuntimeError(f"a start does not train; it printed\n{job.log.read_text()[-3000:]}")
        time.sleep(0.02)
    time.sleep(delay)
    training = num_steps(run) > len(before.steps) and job.launcher.poll() is None
    fault.strike(job, generator)
    return training


def num_steps(run: Path) -> int:
    """Return how many lines metrics.jsonl has: a cheap look at how far a run is."""
    try:
        return RunPaths(run).metrics.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def play(start: Callable[[], Job], fault: Fault, run: Path, patience: float, generator: random.Random) -> Round:
    """Start the run, disturb it, and see what is left of the job and of the run."""
    before, attempts_before = read_state(run), len(read_attempts(RunPaths(run)))
    job = start()
    result = Round(job.name, job.num_ranks, fault.name)
    try:
        training = disturb(job, fault, run, before, generator)
        struck = time.monotonic()
        if fault.leaves_ranks and job.wait(LAUNCHER_END_SECONDS):
            RunPaths(run).stop.touch()
        result.hangs = int(bool(job.wait(patience)))
        result.seconds = time.monotonic() - struck
    finally:
        job.kill()
        RunPaths(run).stop.unlink(missing_ok=True)
    after, attempts = read_state(run), read_attempts(RunPaths(run))
    result.end = (attempts[-1].end or "killed") if len(attempts) > attempts_before else "not begun"
    if result.end != "not begun":  # otherwise the steps of the round before would count again
        result.trained_again = max(0, len(after.steps) - after.newest)
    result.lost = max(0, before.newest - after.newest)
    result.half = len(after.damaged)
    result.repeats = int(not after.gapless)
    if fault.graceful and training and result.end != "done":
        result.not_stopped = int(result.end != "stopped" or result.trained_again > 0)
    if any(getattr(result, name) for name in FAULTY):
        result.text = f"{after.newest=} {after.damaged=}\n{job.log.read_text()[-3000:]}"
    return result


def print_table(rounds: Sequence[Round], console: Console) -> None:
    """Print one row per signal, one per launcher, and one of all."""
    headers = ["rounds", *(name.replace("_", " ") for name in COUNTS), "ended as", "slowest end, s"]
    table = Table("", *headers)
    groups = {name: [r for r in rounds if r.fault == name] for name in sorted({r.fault for r in rounds})}
    groups |= {name: [r for r in rounds if r.launcher == name] for name in LAUNCHERS}
    for name, group in (groups | {"all": list(rounds)}).items():
        if group:
            ends = ", ".join(f"{end} {count}" for end, count in Counter(r.end for r in group).most_common())
            sums = [str(sum(getattr(r, count) for r in group)) for count in COUNTS]
            table.add_row(name, str(len(group)), *sums, ends, f"{max(r.seconds for r in group):.1f}")
    console.print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    signals = "signals: " + "; ".join(fault.name for fault in FAULTS)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=signals, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="starts that are disturbed; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of signals and moments; default: %(default)s")
    parser.add_argument(
        "--launchers", nargs="+", choices=LAUNCHERS, metavar="NAME",
        help=f"of {', '.join(LAUNCHERS)}, in turn; default: those that are installed",
    )  # fmt: skip
    text = "numbers of ranks, of which each start has one at random; default: 2"
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], metavar="N", help=text)
    parser.add_argument("--folder", type=Path, help="for data and runs, must not exist; default: a temporary one")
    text = "seconds after a signal that end a job which lives on: it hangs; default: %(default)s"
    parser.add_argument("--patience", type=float, default=END_SECONDS, help=text)
    parser.add_argument("--json", type=Path, help="also write every round here")
    options = parser.parse_args(argv)
    if options.rounds < 1 or min(options.ranks) < 1:
        parser.error(f"--rounds {options.rounds} --ranks {options.ranks}: give numbers of 1 or more")
    if "mpirun" in (options.launchers or ()) and not shutil.which("mpirun"):
        parser.error("mpirun is not installed (Debian: openmpi-bin); give other --launchers")
    if options.folder and options.folder.exists():
        parser.error(f"--folder {options.folder} exists already; give another one, or remove it")
    return options


def measure(options: argparse.Namespace, folder: Path, console: Console) -> tuple[list[Round], bool, str]:
    """Play all rounds in ``folder``; return them, whether the run equals an undisturbed one, and how it compares."""
    launchers = options.launchers or [name for name in LAUNCHERS if name != "mpirun" or shutil.which("mpirun")]
    subprocess.run(
        [sys.executable, "tools/make_data.py", "--out", str(folder / "data"), "--train_scenes", "60",
         "--val_scenes", "10"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    generator = random.Random(options.seed)
    steps = options.rounds * STEPS_PER_ROUND
    log = folder / "job.log"
    console.print(f"{steps} steps undisturbed")
    finish(Job("torchrun", options.ranks[0], run_flags(folder, "undisturbed", steps), log), START_SECONDS + 5.0 * steps)
    flags, rounds = run_flags(folder, "disturbed", steps), []
    for number in range(options.rounds):
        fault, ranks = generator.choice(FAULTS), generator.choice(options.ranks)
        launcher = launchers[number % len(launchers)]
        start = partial(Job, launcher, ranks, flags, log)
        result = play(start, fault, folder / "disturbed", options.patience, generator)
        rounds.append(result)
        where = f"{number + 1:4} {launcher:10} {ranks} ranks  {fault.name:25} step {num_steps(folder / 'disturbed'):4}"
        console.print(f"{where}  {result.end:12} after {result.seconds:4.1f} s  {result.text}")
    console.print("to the end, undisturbed")
    finish(Job("torchrun", options.ranks[0], flags, log), START_SECONDS + 5.0 * steps)
    parts = ("samples", "metrics") if len(set(options.ranks)) == 1 else ("samples",)
    comparisons = compare_runs(folder / "undisturbed", folder / "disturbed", parts, TOLERANCE)
    text = "\n".join(f"{comparison.part:8} {comparison.text}" for comparison in comparisons)
    return rounds, all(comparison.equal for comparison in comparisons), text


def main(argv: Sequence[str] | None = None) -> int:
    """Disturb, compare, print; return the exit code."""
    options, console = parse(argv), Console()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="aki_faults_"))
    if options.folder:
        folder.mkdir(parents=True)
    try:
        rounds, equal, text = measure(options, folder, console)
    except (RuntimeError, UserError) as error:
        print(f"error: {error}\nThe run is in {folder}.", file=sys.stderr)
        return 1
    print_table(rounds, console)
    console.print(text)
    lost = [name.replace("_", " ") for name in FAULTY if any(getattr(r, name) for r in rounds)]
    if not equal:
        lost.append("the disturbed run is another one")
    if options.json:
        options.json.write_text(json.dumps({"equal": equal, "rounds": [asdict(r) for r in rounds]}, indent=1))
    console.print(f"{len(rounds)} rounds: " + (f"FAULTS: {', '.join(lost)}; see {folder}" if lost else "nothing lost"))
    if not lost and not options.folder:
        shutil.rmtree(folder)
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
