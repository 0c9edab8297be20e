"""The leak check: no supervised position may depend on a later token.

A look-ahead edge i -> j (query i sees the later key j) is legal iff no supervised position t has i <= t < j, where a
position is supervised when its next token is a target or will be generated. Then the tokens up to a supervised position
see nothing after it, and by induction no layer of any depth carries anything from later tokens to it. With two layers
or more the condition is also necessary: t sees i causally, and i sees j.
"""

import numpy as np

from aki_megatron.attention.token_segments import Bools, Ints
from aki_megatron.errors import UserError


class LeakError(UserError):
    """A mask that lets a model read what it is asked to predict."""


def assert_no_leak(edges: Ints, positions: Ints, supervised: Bools, *, rule: str) -> None:
    """Raise LeakError if a look-ahead edge crosses a supervised position.

    edges       [E, 2] query and key as valid tokens; their intervals cover those of all look-ahead edges
    positions   [M] flat position of each valid token
    supervised  [B, T]
    """
    if not len(edges):
        return
    flat = supervised.reshape(-1)
    before = np.zeros(len(flat) + 1, dtype=np.int64)
    np.cumsum(flat, out=before[1:])
    first, last = positions[edges[:, 0]], positions[edges[:, 1]]
    bad = np.flatnonzero(before[last] > before[first])
    if len(bad):
        length = supervised.shape[1]
        sequence, i = divmod(int(first[bad[0]]), length)
        j = int(last[bad[0]]) % length
        t = i + int(np.argmax(supervised[sequence, i:j]))
        raise LeakError(
            f"rule {rule!r} leaks in sequence {sequence} of the batch: token {i} sees the later token {j}, and token "
            f"{t} between them is supervised (its next token is a target or generated), so the model could read its "
            "own targets. A look-ahead may cross no supervised token: use rule 'causal' for captions, and mark the "
            "modality of what is supervised as RESPONSE."
        )
