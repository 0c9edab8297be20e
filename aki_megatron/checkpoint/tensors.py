"""Named tensors that are read one at a time: what every file format is to a conversion.

A conversion never holds a model. A *source* says which tensors there are and reads any one of them; a *view* is a
source under other names; a writer (checkpoint/writers.py) asks a source for one tensor after another, in its own order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aki_megatron.config.model import DecoderConfig
from aki_megatron.model.split import split_of

Shape = tuple[int, ...]
NameTable = Mapping[str, tuple[str, ...]]
"""Our name -> their names: one, or several that we hold as one tensor, put together along axis 0."""


@dataclass(frozen=True)
class TensorFact:
    """What is known of a tensor before it is read."""

    shape: Shape
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Size in memory and in a file."""
        return self.elements * self.dtype.itemsize


class TensorSource(Protocol):
    """Tensors by name."""

    @property
    def facts(self) -> Mapping[str, TensorFact]:
        """Every tensor there is."""
        ...

    def get(self, name: str) -> Tensor:
        """One of them, whole, on the CPU, in the dtype that ``facts`` says."""
        ...


@dataclass(frozen=True)
class View:
    """A source made of functions: each tensor is computed from another source when it is asked for."""

    facts: Mapping[str, TensorFact]
    makers: Mapping[str, Callable[[], Tensor]]

    def get(self, name: str) -> Tensor:
        """See TensorSource.get."""
        return self.makers[name]()


def to_native(theirs: TensorSource, table: NameTable) -> View:
    """Their tensors under our names; several of theirs become one of ours. All names must be there."""

    def maker(names: Sequence[str]) -> Callable[[], Tensor]:
        return lambda: theirs.get(names[0]) if len(names) == 1 else torch.cat([theirs.get(name) for name in names])

    def fact(names: Sequence[str]) -> TensorFact:
        first, *rest = (theirs.facts[name] for name in names)
        rows = sum((other.shape[0] for other in rest), first.shape[0] if first.shape else 0)
        return TensorFact((rows, *first.shape[1:]) if rest else first.shape, first.dtype)

    return View(
        {ours: fact(names) for ours, names in table.items()}, {ours: maker(names) for ours, names in table.items()}
    )


def to_external(ours: TensorSource, table: NameTable, config: DecoderConfig) -> View:
    """Our tensors under their names, the reverse of to_native; one of ours is cut where theirs are several."""
    facts: dict[str, TensorFact] = {}
    makers: dict[str, Callable[[], Tensor]] = {}
    for name, names in table.items():
        whole = ours.facts[name]
        if len(names) == 1:
            facts[names[0]] = whole
            makers[names[0]] = lambda name=name: ours.get(name)  # type: ignore[misc]
            continue
        split = split_of(name, config)
        assert split is not None and split.axis == 0 and len(split.parts) == len(names), name
        first = 0
        for part, rows in zip(names, split.parts, strict=True):
            facts[part] = TensorFact((rows, *whole.shape[1:]), whole.dtype)
            makers[part] = lambda name=name, first=first, rows=rows: ours.get(name)[first : first + rows]  # type: ignore[misc]
            first += rows
    return View(facts, makers)
