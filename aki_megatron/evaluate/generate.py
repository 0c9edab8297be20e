"""Continue a batch of prompts with a KV cache: greedily or by sampling.

One prefill, then one decode step per new token; sequences that have ended leave the batch.
"""

from collections.abc import Callable, Collection

from torch import Tensor

from aki_megatron.evaluate.decoding import Decoder
from aki_megatron.evaluate.sampling import GREEDY, Sampling, TokenChooser
from aki_megatron.model.stage import Stage
from aki_megatron.types import Batch


def generate(
    stage: Stage,
    prompts: Batch,
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    on_logits: Callable[[Tensor], object] = lambda logits: None,
) -> list[list[int]]:
    """Continue every prompt.

    prompts         one segment per sequence, right padded, of any lengths (Template.render_prompt, collated)
    stop_ids        a sequence ends before the first of these tokens
    max_new_tokens  or at this many new tokens
    sampling        how tokens are chosen; draws depend on the number of the prompt, not on the others
    on_logits       gets the logits [sequences that have not ended, V] that each new token is chosen by

    Returns the new tokens of each sequence without the stop id. Every new token attends to all earlier tokens of its
    sequence; no prompt token attends to a new one. The result equals that of each prompt by itself and without a cache.
    """
    generated: list[list[int]] = [[] for _ in prompts.token_ids]
    if max_new_tokens < 1:
        return generated
    decoder = Decoder(stage)
    choosers = [TokenChooser(sampling, number) for number in range(len(generated))]
    logits = decoder.admit(prompts)
    running = list(range(len(generated)))  # the prompts of the decoder's batch, in its order
    while True:
        on_logits(logits)
        greedy = logits.argmax(dim=-1).tolist() if sampling.temperature == 0.0 else None
        tokens = [
            choosers[prompt].choose(logits[number]) if greedy is None else greedy[number]
            for number, prompt in enumerate(running)
        ]
        ended = []
        for number, (prompt, token) in enumerate(zip(running, tokens, strict=True)):
            if token not in stop_ids:
                generated[prompt].append(token)
            if token in stop_ids or len(generated[prompt]) == max_new_tokens:
                ended.append(number)
        decoder.remove(ended)
        for number in reversed(ended):
            running[number], tokens[number] = running[-1], tokens[-1]
            del running[-1], tokens[-1]
        if not running:
            return generated
        logits = decoder.step(tokens)
