"""Sources of named tensors that are read one at a time, and sources derived from others.

A conversion never holds a whole model: a source lists its tensors and reads any one of them, and a writer
(checkpoint/writers.py, checkpoint/dcp_io.py) asks a source for one tensor after another, in its own order.

*Native* names are the parameter names of our model; *external* names are those of another format.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from aki_megatron.config.model import DecoderConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.model.sharding import shard_spec

Shape = tuple[int, ...]
NameTable = Mapping[str, tuple[str, ...]]
"""Native name -> external names: one, or several whose tensors we hold as one, concatenated along axis 0."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, known before it is read."""

    shape: Shape
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in memory and in a file."""
        return self.numel * self.dtype.itemsize


class TensorSource(Protocol):
    """Tensors by name, each read when it is asked for."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of every tensor, in the source's order."""
        ...

    def get(self, name: str) -> Tensor:
        """Read one tensor: whole, on the CPU, of the shape and dtype in ``specs``."""
        ...


class StoredTensors(TensorSource, Protocol):
    """A TensorSource of a checkpoint."""

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        ...


@dataclass(frozen=True)
class LazyTensors:
    """A TensorSource made of functions: each tensor is computed when it is asked for."""

    specs: Mapping[str, TensorSpec]
    getters: Mapping[str, Callable[[], Tensor]]

    def get(self, name: str) -> Tensor:
        return self.getters[name]()


@dataclass(frozen=True)
class ProgressSource:
    """A TensorSource that passes the size in bytes of each tensor it reads to ``on_read``."""

    source: TensorSource
    on_read: Callable[[int], None]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self.source.specs

    def get(self, name: str) -> Tensor:
        tensor = self.source.get(name)
        self.on_read(tensor.nbytes)
        return tensor


MAX_NAMED = 8
"""Tensors with values that are not finite that an error names; it counts the others."""


def require_finite(tensor: Tensor, name: str, where: Path, others: Iterable[tuple[str, Tensor]] = ()) -> Tensor:
    """Return the tensor.

    others  name and content of the source's other tensors, read only where this one is refused

    Raises CheckpointError with every tensor that holds values that are NaN or infinite, and how many, if this one does.
    """
    if not (bad := _num_non_finite(tensor)):
        return tensor
    also = [(other, found, content.numel()) for other, content in others if (found := _num_non_finite(content))]
    named = ", ".join(f"{other} ({found:,} of {numel:,})" for other, found, numel in also[:MAX_NAMED])
    rest = f" and {len(also) - MAX_NAMED} more" if len(also) > MAX_NAMED else ""
    text = f"; so do {len(also)} other tensors: {named}{rest}" if also else ""
    raise CheckpointError(
        f"{where}: {name} holds {bad:,} NaN or infinite values of {tensor.numel():,}{text}; fetch it again, or take an "
        "earlier checkpoint."
    )


def _num_non_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    # the extremes are NaN where any element is; faster than isfinite() of all elements, and without a copy
    if bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        return 0
    return tensor.numel() - int(tensor.isfinite().sum())


def to_native(external: TensorSource, table: NameTable) -> LazyTensors:
    """External tensors under native names, several for one name concatenated; every external name must exist.

    A table of one external name per native name renames and selects.
    """

    def getter(names: Sequence[str]) -> Callable[[], Tensor]:
        if len(names) == 1:
            return lambda: external.get(names[0])
        return lambda: torch.cat([external.get(name) for name in names])

    def spec(names: Sequence[str]) -> TensorSpec:
        first, *rest = (external.specs[name] for name in names)
        if not rest:
            return first
        return TensorSpec((first.shape[0] + sum(other.shape[0] for other in rest), *first.shape[1:]), first.dtype)

    return LazyTensors(
        {native: spec(names) for native, names in table.items()},
        {native: getter(names) for native, names in table.items()},
    )


def to_external(native: TensorSource, table: NameTable, config: DecoderConfig) -> LazyTensors:
    """Native tensors under external names, the inverse of ``to_native``: split along axis 0 where there are several."""
    specs: dict[str, TensorSpec] = {}
    getters: dict[str, Callable[[], Tensor]] = {}
    for name, parts in table.items():
        full = native.specs[name]
        if len(parts) == 1:
            specs[parts[0]] = full
            getters[parts[0]] = lambda name=name: native.get(name)  # type: ignore[misc]
            continue
        spec = shard_spec(name, config)
        assert spec is not None and spec.dim == 0 and len(spec.part_sizes) == len(parts), name
        start = 0
        for part, size in zip(parts, spec.part_sizes, strict=True):
            specs[part] = TensorSpec((size, *full.shape[1:]), full.dtype)
            getters[part] = lambda name=name, start=start, end=start + size: native.get(name)[start:end]  # type: ignore[misc]
            start += size
    return LazyTensors(specs, getters)


def select(source: TensorSource, names: Collection[str]) -> LazyTensors:
    """The named tensors of a source, in this order."""
    return to_native(source, {name: (name,) for name in names})


def cast(source: TensorSource, dtype: torch.dtype) -> LazyTensors:
    """The same tensors in another dtype."""
    return LazyTensors(
        {name: TensorSpec(spec.shape, dtype) for name, spec in source.specs.items()},
        {name: lambda name=name: source.get(name).to(dtype) for name in source.specs},  # type: ignore[misc]
    )


def merge(*sources: TensorSource) -> LazyTensors:
    """The tensors of several sources, no two of which hold the same name."""
    specs: dict[str, TensorSpec] = {}
    getters: dict[str, Callable[[], Tensor]] = {}
    for source in sources:
        assert not specs.keys() & source.specs.keys()
        specs |= source.specs
        getters |= {name: lambda source=source, name=name: source.get(name) for name in source.specs}  # type: ignore[misc]
    return LazyTensors(specs, getters)


def total_bytes(source: TensorSource) -> int:
    """Size of all tensors of a source."""
    return sum(spec.nbytes for spec in source.specs.values())
