"""A folder that looks like thousands of indexed tars: one tar and its index under many names.

A start asks the size and time of every name and reads its index header or one manifest, as it would of real tars, but
everything is in the page cache after the first is read.
"""

import os
from pathlib import Path

from aki_megatron.data.tar_index import index_path


def link_copies(first: Path, count: int) -> str:
    """Hard-link ``first`` (``00000.tar``) and its index until there are ``count`` tars; return their brace pattern."""
    last = f"{count - 1:0{len(first.stem)}}"
    for number in range(1, count):
        copy = first.with_name(f"{number:0{len(first.stem)}}.tar")
        os.link(first, copy)
        os.link(index_path(first), index_path(copy))
    return f"{{{first.stem}..{last}}}.tar"
