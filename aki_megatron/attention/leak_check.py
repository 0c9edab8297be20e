"""The leak certificate: no scored row may depend on a later token.

A look-ahead edge i -> j (row i sees the later column j) is legal iff no scored row t has i <= t < j, where a row is
scored when its next token is learnt or generated. Then the tokens up to a scored row see nothing after it, and by
induction no layer of any depth carries anything from later tokens to it. With two layers or more the condition is also
necessary: t sees i causally, and i sees j.
"""

import numpy as np

from aki_megatron.attention.token_segments import Bools, Ints
from aki_megatron.errors import UserError


class LeakError(UserError):
    """A mask that lets a model read what it is asked to predict."""


def assert_no_leak(edges: Ints, place: Ints, scored: Bools, *, rule: str) -> None:
    """Raise LeakError if a scored row lies under a look-ahead edge.

    edges   [E, 2] row and column as live tokens; their intervals cover those of all look-ahead edges
    place   [M] flat position of each live token
    scored  [B, T]
    """
    if not len(edges):
        return
    flat = scored.reshape(-1)
    before = np.zeros(len(flat) + 1, dtype=np.int64)
    np.cumsum(flat, out=before[1:])
    first, last = place[edges[:, 0]], place[edges[:, 1]]
    bad = np.flatnonzero(before[last] > before[first])
    if len(bad):
        width = scored.shape[1]
        row, i = divmod(int(first[bad[0]]), width)
        j = int(last[bad[0]]) % width
        t = i + int(np.argmax(scored[row, i:j]))
        raise LeakError(
            f"rule {rule!r} leaks in row {row} of the batch: token {i} sees the later token {j}, and token {t} between "
            f"them is scored (its next token is learnt or generated), so the model could read its own targets. "
            "A look-ahead may cross no scored token: use rule 'causal' for captions, and mark the modality of "
            "what is learnt as RESPONSE."
        )
