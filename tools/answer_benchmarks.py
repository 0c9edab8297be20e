"""Answer the questions of benchmarks with a model (tools/evaluate.py run).

    python tools/evaluate.py run runs/aki4b/sft --out results/sft --data /datasets/benchmarks
    python tools/evaluate.py run aki-hf --out results/aki --benchmarks MME,POPE --score      # a folder that to-hf wrote
    python tools/evaluate.py run runs/aki4b/sft/checkpoints/step_005000 --out results/5000 --per_benchmark 200
    torchrun --nproc_per_node 8 tools/evaluate.py run runs/aki4b/sft --out results/sft       # a model on each GPU
    torchrun --nproc_per_node 8 tools/evaluate.py run MODEL --out results/big --tensor_parallel 2
    sbatch --ntasks-per-node=8 --gpus-per-node=8 slurm/evaluate.sbatch run runs/aki4b/sft --out results/sft

Every answer is written as soon as it exists. Started again, with the same or another number of processes, it goes on
with what is missing. A question that cannot be asked (an image that is missing or damaged) is counted, and scored as a
wrong answer. Writes FOLDER/BENCHMARK/predictions*.jsonl; exits with 1 while questions are unanswered. Benchmarks whose
files are missing are left out, unless --benchmarks names them.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from aki_megatron.argument_types import as_path, whole_number
from aki_megatron.console import Console, IsolatedConsole
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.evaluate.answer_loop import TensorRanks
from aki_megatron.evaluate.benchmark_folder import forget_errors
from aki_megatron.evaluate.benchmark_run import Worker, WorkerSettings, end_together, share_plan
from aki_megatron.evaluate.benchmarks.files import MissingFiles, QuestionSet, load_questions
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS, find_benchmark
from aki_megatron.evaluate.model_loading import DTYPES, ModelFolder, load_model, open_model
from aki_megatron.evaluate.prompts import PROFILES
from aki_megatron.evaluate.run_progress import RunProgress
from aki_megatron.evaluate.work_plan import WorkPlan, make_plan
from aki_megatron.parallel.launch import Launch, check_master
from aki_megatron.parallel.shared_store import SharedStore
from aki_megatron.parallel.topology import Topology, discover_launch, init_distributed, local_device
from aki_megatron.supervise.run_lock import LockHolder, RunLock
from aki_megatron.supervise.run_paths import RunPaths

Score = Callable[[Path, Sequence[str]], object]
"""Scores the benchmarks of a folder by name, and prints the scores."""

STOPPING = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}


def run_command(argv: Sequence[str], environ: Mapping[str, str], default_roots: Sequence[Path], score: Score) -> int:
    """Answer and, where asked to, score; return the exit code."""
    arguments = argument_parser().parse_args(argv)
    _check(arguments)
    launch = discover_launch(environ)
    check_master(launch)
    if launch.world_size % arguments.tensor_parallel:
        raise ConfigError(
            f"--tensor_parallel {arguments.tensor_parallel} does not divide the {launch.world_size} processes; start a "
            "multiple of it (torchrun --nproc_per_node)."
        )
    console = IsolatedConsole(sys.stdout, quiet=launch.rank != 0)
    with stopping_signals():
        try:
            return _run(arguments, launch, console, default_roots, score)
        except KeyboardInterrupt as stopped:
            number = stopped.args[0] if stopped.args else signal.SIGINT
            if launch.rank == 0:
                text = f"evaluate: {STOPPING[number]}; the same command goes on with what is missing."
                print(text, file=sys.stderr)
            return 128 + number
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"--batch_size {arguments.batch_size} does not fit into the memory of the GPU ({error}); lower it, or "
                "split the model (--tensor_parallel)."
            ) from error


def _run(
    arguments: argparse.Namespace, launch: Launch, console: Console, default_roots: Sequence[Path], score: Score
) -> int:
    store = SharedStore.open(launch)
    lost: list[str] = []
    opened: list[ModelFolder] = []
    names: list[str] = []
    damaged: list[str] = []
    locks: list[RunLock] = []

    def check() -> None:
        if lost:
            raise DataError(f"{lost[0]}; this start ends.")

    def plan() -> WorkPlan:
        locks.append(_hold(arguments.out, launch, console, lost.append))
        opened.append(open_model(arguments.model, arguments.tokenizer))
        found = _load_all(arguments, default_roots, console, damaged)
        names.extend(each.benchmark.name for each in found)
        if arguments.retry_errors:
            forget_errors(arguments.out)
        return make_plan(
            arguments.out,
            found,
            profile=arguments.profile,
            model=f"{opened[0].name} ({opened[0].digest[:12]}, {_dtype_name(arguments)})",
            max_new_tokens=_max_new_tokens(arguments),
            per_benchmark=arguments.per_benchmark,
            num_workers=launch.world_size // arguments.tensor_parallel,
        )

    try:
        shared = share_plan(store, plan)
        folder = opened[0] if opened else open_model(arguments.model, arguments.tokenizer, verify=False)
        is_complete = _answer(arguments, launch, console, store, shared, folder, check)
        if launch.rank == 0:
            _end(arguments, console, is_complete, names, damaged, score)
        end_together(store)
        return 0 if is_complete and not damaged else 1
    finally:
        for lock in locks:
            lock.release()


def _answer(
    arguments: argparse.Namespace,
    launch: Launch,
    console: Console,
    store: SharedStore,
    plan: WorkPlan,
    folder: ModelFolder,
    check: Callable[[], None],
) -> bool:
    """Answer what the plan holds; return whether nothing is missing any more (on rank 0, which knows of all)."""
    workers = launch.world_size // arguments.tensor_parallel
    settings = WorkerSettings(
        folder=arguments.out,
        profile=PROFILES[arguments.profile],
        max_new_tokens=_max_new_tokens(arguments),
        batch_size=arguments.batch_size,
        worker=launch.rank // arguments.tensor_parallel,
        num_workers=workers,
        threads=arguments.threads,
    )
    console.print(
        f"{folder.name}: {len(plan.questions):,} of {plan.total:,} questions to answer, {workers} "
        f"model{'s' * (workers > 1)}, {_dtype_name(arguments)} on {_device_name(arguments)}",
        soft_wrap=True,
    )
    if not plan.questions:
        return True
    topology: Topology | None = None
    if arguments.tensor_parallel > 1:
        topology = init_distributed(launch, tensor=arguments.tensor_parallel, pipeline=1)
    try:
        model = load_model(
            folder, device=_device(arguments, launch), dtype=DTYPES[_dtype_name(arguments)], topology=topology
        )
        progress = RunProgress(plan.total, plan.num_answered_before, console) if launch.rank == 0 else None
        worker = Worker(plan, settings, store, progress=progress, check=check)
        worker.answer(model, TensorRanks(topology))
        is_complete = worker.finish()
        for text in worker.tally.first_errors:
            console.print(f"could not be asked: {text}", soft_wrap=True)
        return is_complete
    finally:
        if topology is not None:
            topology.shutdown()


def _end(
    arguments: argparse.Namespace,
    console: Console,
    is_complete: bool,
    names: Sequence[str],
    damaged: Sequence[str],
    score: Score,
) -> None:
    for line in damaged:
        console.print(f"not answered: {line}", soft_wrap=True)
    if not is_complete:
        console.print("Some processes were lost with their questions; the same command answers those.", soft_wrap=True)
    if arguments.score:
        score(arguments.out, names)
    else:
        console.print(f"scores: python tools/evaluate.py score {arguments.out}", soft_wrap=True)


def _load_all(
    arguments: argparse.Namespace, default_roots: Sequence[Path], console: Console, damaged: list[str]
) -> list[QuestionSet]:
    """Read the questions; by default of the benchmarks whose files can be read. Faults are added to ``damaged``."""
    wanted = [name.strip() for name in arguments.benchmarks.split(",") if name.strip()]
    found: list[QuestionSet] = []
    missing: list[str] = []
    for benchmark in [find_benchmark(name) for name in dict.fromkeys(wanted)] or BENCHMARKS.values():
        try:
            found.append(load_questions(benchmark, arguments.data or default_roots))
        except DataError as error:
            if wanted:
                raise
            if isinstance(error, MissingFiles):
                missing.append(benchmark.name)
            else:
                damaged.append(f"{benchmark.name}: {error}")
            continue
        console.print(f"{benchmark.name}: {len(found[-1].questions):,} questions, {found[-1].source}", soft_wrap=True)
    if missing:
        console.print(f"without files, left out: {', '.join(missing)} (evaluate.py check)", soft_wrap=True)
    if not found:
        roots = ", ".join(map(str, arguments.data or default_roots))
        text = f"No benchmark can be read in {roots}; evaluate.py check says which files are needed."
        raise DataError("\n  ".join([text, *damaged]))
    return found


def _hold(folder: Path, launch: Launch, console: Console, on_lost: Callable[[str], None]) -> RunLock:
    """Take the lock of an output folder, which one start at a time may hold."""
    if RunPaths(folder).checkpoints.is_dir():
        raise ConfigError(f"--out {folder} is the folder of a training run; give the answers a folder of their own.")

    def on_waiting(text: str) -> None:
        console.print(text, soft_wrap=True)

    def in_use(paths: RunPaths, holder: LockHolder) -> ConfigError:
        return ConfigError(
            f"{folder} is in use: another start writes answers there ({holder.describe()}). Wait for its end, or give "
            f"another --out. If that process is dead, delete {paths.running} and start again."
        )

    lock = RunLock(RunPaths(folder), launch.attempt, launch.start_id, on_waiting=on_waiting, in_use=in_use)
    lock.watch(on_lost)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written to: {error.strerror}.") from error
    return lock


def _check(arguments: argparse.Namespace) -> None:
    if arguments.device and arguments.tensor_parallel > 1:
        raise ConfigError("--device cannot be chosen with --tensor_parallel; hide the GPUs (CUDA_VISIBLE_DEVICES=).")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; give --device cpu.")


def _device_name(arguments: argparse.Namespace) -> str:
    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _device(arguments: argparse.Namespace, launch: Launch) -> torch.device:
    return torch.device("cpu") if _device_name(arguments) == "cpu" else local_device(launch)


def _dtype_name(arguments: argparse.Namespace) -> str:
    return arguments.dtype or ("bf16" if _device_name(arguments) == "cuda" else "fp32")


def _max_new_tokens(arguments: argparse.Namespace) -> int:
    return arguments.max_new_tokens or PROFILES[arguments.profile].max_new_tokens


@contextmanager
def stopping_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt(number) at SIGINT and SIGTERM; what is ignored stays ignored."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = {each: signal.getsignal(each) for each in STOPPING if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def argument_parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=as_path, metavar="MODEL", help="a run folder (its newest checkpoint), a checkpoint, or a folder "
        "that convert.py to-hf wrote")  # fmt: skip
    add("--out", type=as_path, required=True, metavar="FOLDER", help="folder of the answers; one for each model")
    add("--data", type=as_path, action="append", default=[], help="folder with the benchmarks' files; may be repeated "
        "(default: the environment variable LMUData, then data/benchmarks)")  # fmt: skip
    add("--benchmarks", default="", help=f"comma list (default: all that are there): {', '.join(BENCHMARKS)}")
    add("--profile", choices=list(PROFILES), default=next(iter(PROFILES)), help="prompts (default %(default)s)")
    add("--per_benchmark", type=whole_number(0, 10**9), default=0, metavar="N", help="about N questions of each, "
        "evenly spaced (default 0: all)")  # fmt: skip
    add("--batch_size", type=whole_number(1, 4096), default=32, help="questions at a time (default %(default)s)")
    longest = ", ".join(f"{name} {profile.max_new_tokens}" for name, profile in PROFILES.items())
    add(
        "--max_new_tokens", type=whole_number(1, 2**20), help=f"longest reply (default: that of the profile, {longest})"
    )
    add("--tokenizer", type=as_path, help="folder of the tokenizer (default: the one that comes with the weights)")
    add("--device", choices=("cuda", "cpu"), help="default: the GPU where there is one")
    add("--dtype", choices=list(DTYPES), help="of weights and computation (default: bf16 on a GPU, fp32 on a CPU)")
    add("--tensor_parallel", type=whole_number(1, 64), default=1, metavar="K", help="processes that hold one model "
        "together, for models that one GPU cannot hold (default 1)")  # fmt: skip
    add("--threads", type=whole_number(1, 256), default=4, help="threads of each process that read and decode images "
        "(default %(default)s)")  # fmt: skip
    add("--retry_errors", action="store_true", help="ask questions again that could not be asked before")
    add("--score", action="store_true", help="score the answers at the end, as the command score does by default")
    return parser
