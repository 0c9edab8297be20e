"""Errors that the end of another rank causes, and the format of errors."""

import pytest
import torch.distributed as dist

from aki_megatron.errors import DataError, UserError
from aki_megatron.supervise.secondary_failures import format_error, is_secondary_failure

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:15558."


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "secondary"),
    [
        (RuntimeError(CLOSED), True),
        (RuntimeError("Timed out waiting 600000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (caused(DataError("cannot save"), RuntimeError(CLOSED)), True),
        (caused(DataError("cannot save"), OSError("no space left on device")), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionRefusedError("Connection refused"), False),
        (BrokenPipeError("Broken pipe"), False),
        (MemoryError(), False),
    ],
)
def test_secondary_failures_are_distinguished_from_causes(error: BaseException, secondary: bool) -> None:
    assert is_secondary_failure(error) == secondary


def test_errors_are_formatted_on_one_line() -> None:
    assert format_error(ValueError("a\n  b")) == "ValueError: a b"
    assert format_error(MemoryError()) == "MemoryError"
    assert format_error(UserError("a\nb")) == "UserError: a\nb"
    assert len(format_error(ValueError("x" * 10000))) < 700
