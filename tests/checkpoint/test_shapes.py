"""Names and shapes of a model, and the one error that lists how a file or checkpoint differs from it."""

import pytest
import torch

from aki_megatron.checkpoint.shapes import check_shapes, compare_shapes, meta_parameters, model_shapes
from aki_megatron.config.model import ModelConfig
from aki_megatron.errors import CheckpointError


def test_parameters_of_the_whole_model_take_no_memory():
    parameters = meta_parameters(ModelConfig())
    assert sum(parameter.numel() for parameter in parameters.values()) > 4e9
    assert all(parameter.is_meta for parameter in parameters.values())
    assert model_shapes(ModelConfig()) == {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert sum(torch.Size(shape).numel() for shape in model_shapes(ModelConfig()).values()) == 4_330_957_954


def test_every_difference_is_listed():
    found, expected = {"a": (1,), "b": (2, 3), "d": ()}, {"a": (1,), "b": (3, 2), "c": (4,)}
    with pytest.raises(CheckpointError) as caught:
        check_shapes(found, expected, "file.pt", "Take another.")
    assert str(caught.value).splitlines() == [
        "The tensors of file.pt are not those of the model (3 differences):",
        "  missing: c (4,)",
        "  unexpected: d ()",
        "  shape mismatch: b is (2, 3), the model needs (3, 2)",
        "Take another.",
    ]
    check_shapes(expected, expected, "file.pt")


def test_a_long_list_is_cut_off_with_a_count():
    with pytest.raises(CheckpointError, match=r"\(50 differences\)") as caught:
        check_shapes({}, {f"t{number}": (1,) for number in range(50)}, "file.pt")
    lines = str(caught.value).splitlines()
    assert len(lines) == 43 and lines[41] == "  and 10 more" and "model section" in lines[42]


def test_an_unknown_shape_equals_no_other():
    comparison = compare_shapes({"a": None, "b": (1,)}, {"a": (1,), "b": (1,)})
    assert comparison.mismatched == ["a"] and not comparison.missing and not comparison.unexpected
