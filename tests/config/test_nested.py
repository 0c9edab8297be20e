"""Nested mappings: flattened, set by dotted keys, merged."""

import pytest

from aki_megatron.config.nested import dotted, flatten, merge, set_dotted


def test_flatten() -> None:
    values = {"a": {"b": 1, "c": {}}, "d": [2, {"e": 3}]}
    assert list(flatten(values)) == [("a.b", 1), ("a.c", {}), ("d", [2, {"e": 3}])]
    assert list(flatten(values, open_lists=True)) == [("a.b", 1), ("a.c", {}), ("d.0", 2), ("d.1.e", 3)]


def test_set_dotted() -> None:
    values = {"a": {"b": 1}}
    set_dotted(values, "a.b", 2)
    set_dotted(values, "c.d.e", 3)
    assert values == {"a": {"b": 2}, "c": {"d": {"e": 3}}}


@pytest.mark.parametrize(
    ("under", "over", "merged"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": 1}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": {}}, {"a": {"b": 1}}),
    ],
)
def test_merge(under: dict, over: dict, merged: dict) -> None:
    before = (repr(under), repr(over))
    assert merge(under, over) == merged
    assert (repr(under), repr(over)) == before


def test_locations_as_text() -> None:
    assert dotted(("data", "sources", 0, "weight")) == "data.sources[0].weight"
