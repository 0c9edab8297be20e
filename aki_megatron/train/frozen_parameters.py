"""What a run's checkpoints leave out because no phase trains it (checkpoint.exclude_frozen_parameters).

Such a weight comes from init.* at every start, is known by its sha256 from the first checkpoint on, and is compared
with it before a run goes on. Weights that no file of init.* holds whole (random ones, and tables that were extended by
random rows) stay in checkpoints: random numbers are not the same on every processor.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from aki_megatron.checkpoint.base_weights import BASE_KEYS, find_base_checkpoint, manifest_sha256, open_folder
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.collectives import RankGroup
from aki_megatron.checkpoint.frozen_record import (
    FILE,
    INIT_WEIGHTS,
    FrozenBase,
    FrozenRecord,
    FrozenTensor,
    name_some,
    read_record,
    tensor_sha256,
)
from aki_megatron.checkpoint.initial_weights import weight_initializer
from aki_megatron.checkpoint.shapes import meta_parameters, model_shapes
from aki_megatron.config.run import InitConfig, RunConfig
from aki_megatron.engine import global_state
from aki_megatron.engine.base import Engine, ParameterFilter
from aki_megatron.engine.phased import PhasedEngine
from aki_megatron.errors import CheckpointError
from aki_megatron.model.stage import Stage
from aki_megatron.model.trainable import is_trained
from aki_megatron.parallel.topology import Topology


def init_path(init: InitConfig, key: str) -> Path | None:
    """Return what ``init.vision`` and so on name."""
    path: Path | None = getattr(init, key.removeprefix("init."))
    return path


def needed_keys(config: RunConfig, checkpoint: Path | None) -> tuple[str, ...]:
    """Return the keys of init.* whose files a start reads.

    checkpoint  from which the run goes on; None: it begins
    """
    if (record := read_record(checkpoint)) is not None:
        return tuple(record.bases)
    if checkpoint is not None and not config.checkpoint.exclude_frozen_parameters:
        return ()
    return tuple(key for key in BASE_KEYS if init_path(config.init, key) is not None)


class FrozenParameters:
    """What checkpoints leave out, through one start of a run; every method is collective.

    In this order: ``initializer`` for building the engine, ``check_built``, ``load`` where the run goes on; then
    ``is_saved`` and ``files`` for every save, ``load`` for every rollback.
    """

    def __init__(self, config: RunConfig, topology: Topology, checkpoint: Path | None) -> None:
        """``checkpoint`` is the one that the run goes on from; None: it begins.

        Raises CheckpointError or ConfigError where init.* that is needed is missing, or is of another model.
        """
        self._config = config
        self._topology = topology
        self._checkpoint = checkpoint
        self._ranks = RankGroup()
        self._saved = read_record(checkpoint)
        self._init = self._needed_init()
        self._names_by_key: dict[str, list[str]] = {}
        self._trained: set[str] = set()
        self._digests: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._originals: dict[str, Tensor] = {}
        """What the checkpoint leaves out and this start may train, by its key in the state: a rollback must undo it."""
        is_excluding = config.checkpoint.exclude_frozen_parameters
        if self._saved is not None or is_excluding:
            plans = config.training_plans()
            self._shapes = {name: tuple(p.shape) for name, p in meta_parameters(config.model, plans[0]).items()}
            self._trained = {name for name in self._shapes if any(is_trained(name, plan) for plan in plans)}
            self._names_by_key = self._taken_names()
        left_out = [name for name in self._names if name not in self._trained]
        self._left_out = frozenset(left_out if is_excluding else ())

    @property
    def _names(self) -> frozenset[str]:
        """What this start takes from init.* and compares."""
        return frozenset(name for names in self._names_by_key.values() for name in names)

    def initializer(self) -> Callable[[Stage], None]:
        """Return the function that sets a new stage's weights (see weight_initializer)."""
        names = None if self._checkpoint is None else self._names
        return weight_initializer(self._init, self._config.model, self._topology, names=names)

    def check_built(self, engine: Engine) -> None:
        """Take the digests of what init.* gave to the engine.

        Raises CheckpointError where they are not those in the checkpoint that the run goes on from.
        """
        if not self._names:
            return
        self._digests = self._compute_digests(engine)
        if self._left_out and self._ranks.rank == 0:
            self._files = {FILE: FrozenRecord(dict(self._bases())).to_json()}
        if self._saved is None:
            return
        for key, base in self._saved.bases.items():
            wrong = [name for name, each in base.tensors.items() if self._digests.get(name) != each.sha256]
            if wrong:
                raise CheckpointError(
                    f"{self._checkpoint} leaves out what its run never trained, and {key}="
                    f"{init_path(self._init, key)} holds other weights than the run began with: {name_some(wrong)} "
                    f"have another sha256. Bring back {base.path}{f' ({base.checkpoint})' * bool(base.checkpoint)}, or "
                    f"say where it is now (--{key} PATH)."
                )
        trained = self._names & self._trained
        if trained:
            state = engine.state_dict(trained.__contains__)
            keys = set(map(_key, trained))
            self._originals = {key: tensor.to("cpu") for key, tensor in state.items() if key in keys}

    def load(
        self, engine: PhasedEngine, checkpointer: Checkpointer, checkpoint: Path, phase: int | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint of this run into the engine; return what was saved as ``extra``.

        phase  of the checkpoint, for a rollback; None: the engine is in it already

        Raises CheckpointError where the checkpoint cannot be loaded, or holds frozen weights that init.* does not,
        though the next checkpoints are to leave them out.
        """
        record = read_record(checkpoint)
        left_out = frozenset() if record is None else frozenset(record.tensors)
        if phase is not None:
            engine.select_phase(phase, keeps=left_out.__contains__ if left_out else None)

        def is_stored(name: str) -> bool:
            return name not in left_out

        tensors = engine.state_dict(is_stored)
        extra = checkpointer.load(checkpoint, tensors)
        restored = left_out & self._trained & self._names  # what check_built has kept of it
        for key in self._originals.keys() & set(map(_key, restored)):
            tensors[key] = self._originals[key].to(self._topology.device)
        engine.load_state_dict(tensors, lambda name: is_stored(name) or name in restored)
        if phase is None and record is None and self._left_out:
            self._check_same(engine, checkpoint)
        return extra

    @property
    def is_saved(self) -> ParameterFilter:
        """Whether checkpoints hold a parameter."""
        return lambda name: name not in self._left_out

    def files(self) -> dict[str, str]:
        """Return the record of what is left out, for the checkpoint's files; on rank 0, and where there is any."""
        return self._files

    def describe(self) -> str:
        """Return a line about it for the start of a run; empty where there is nothing to say."""
        if not self._config.checkpoint.exclude_frozen_parameters:
            if self._saved is None:
                return ""
            return (
                f"frozen weights: read again from {self._sources(self._names)}; checkpoints hold everything from now on"
            )
        if not self._left_out:
            reason = "no parameter stays frozen in all phases" if not self._never_trained() else "none is from init.*"
            return f"checkpoints: leave nothing out (checkpoint.exclude_frozen_parameters): {reason}"
        count = sum(_numel(self._shapes[name]) for name in self._left_out)
        total = sum(_numel(shape) for shape in self._shapes.values())
        return (
            f"checkpoints: leave out {count:,} of {total:,} parameters, which never train; they stay in "
            f"{self._sources(self._left_out)}, which must not change"
        )

    def _never_trained(self) -> set[str]:
        return self._shapes.keys() - self._trained

    def _needed_init(self) -> InitConfig:
        """Return what this start reads of init.*, with the checkpoint that init.weights stands for."""
        config, saved = self._config, self._saved
        keys = needed_keys(config, self._checkpoint)
        for key in keys:
            if init_path(config.init, key) is None:
                raise CheckpointError(
                    f"{self._checkpoint} leaves out what its run never trained; give the weights that it began with: "
                    f"--{key} PATH."
                )
        unused = [name for name in InitConfig.model_fields if f"init.{name}" not in keys]
        init = config.init.model_copy(update=dict.fromkeys(unused))
        if (folder := init.weights) is None:
            return init
        base = saved.bases.get(INIT_WEIGHTS) if saved is not None else None
        found = self._ranks.run_on_all(lambda: find_base_checkpoint(folder, base))
        return init.model_copy(update={"weights": self._ranks.gather(found)[0]})

    def _taken_names(self) -> dict[str, list[str]]:
        """Return the frozen parameters that init.* holds, by key: those that are left out, or may be."""
        if self._saved is not None:
            return {key: list(base.tensors) for key, base in self._saved.bases.items()}
        never, model = self._never_trained(), self._config.model
        found: dict[str, list[str]] = {}
        for key in BASE_KEYS:
            path = init_path(self._init, key)
            if path is None:
                continue
            if key == INIT_WEIGHTS:
                held: Collection[str] = model_shapes(model)
            else:
                folder = open_folder(key, path, model)
                held = [name for name, names in folder.table.items() if not {*names} & {*folder.extended}]
            found[key] = sorted(never & set(held))
        return found

    def _check_same(self, engine: Engine, checkpoint: Path) -> None:
        """Compare the frozen weights of a whole checkpoint, which the engine now has, with those of init.*."""
        loaded = self._compute_digests(engine)
        if wrong := [name for name in self._left_out if loaded[name] != self._digests[name]]:
            raise CheckpointError(
                f"checkpoint.exclude_frozen_parameters=true, but {self._sources(wrong)} holds other weights than "
                f"{checkpoint}: {name_some(wrong)}. Name what the run began with (of a run that went on since, its "
                "checkpoint: --init.weights RUN/checkpoints/step_000100), or go on with "
                "--checkpoint.exclude_frozen_parameters false."
            )

    def _compute_digests(self, engine: Engine) -> dict[str, str]:
        """Return the digest of each of ``_names`` in the engine, on every rank; each is computed by one rank."""
        topology, own = self._topology, dict[str, str]()
        rank, ranks = topology.data_rank * topology.tensor + topology.tensor_rank, topology.data * topology.tensor
        for number, (name, weight) in enumerate(engine.named_weights(self._names.__contains__)):
            if number % ranks == rank:
                own[name] = tensor_sha256(weight)
        return {name: digest for found in self._ranks.gather(own) for name, digest in found.items()}

    def _bases(self) -> Iterator[tuple[str, FrozenBase]]:
        for key, names in self._names_by_key.items():
            tensors: Mapping[str, FrozenTensor] = {
                name: FrozenTensor(self._shapes[name], self._digests[name]) for name in names if name in self._left_out
            }
            if not tensors:
                continue
            given, opened = init_path(self._config.init, key), init_path(self._init, key)
            assert given is not None and opened is not None
            known = (opened.name, manifest_sha256(opened)) if key == INIT_WEIGHTS else ("", "")
            yield key, FrozenBase(str(given), str(given.absolute()), tensors, *known)

    def _sources(self, names: Collection[str]) -> str:
        used = [key for key, held in self._names_by_key.items() if {*names} & {*held}]
        return " and ".join(f"{key}={init_path(self._init, key)}" for key in used)


def _key(parameter: str) -> str:
    """Return the key of a parameter's weight in the state of an engine."""
    return global_state.key(global_state.WEIGHT, parameter)


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
