"""Generation: prefill and cached decoding give what recomputation without a cache gives."""

import pytest
import torch
import torch.nn.functional as F
from attention_samples import CONFIGS, IMAGE, RESPONSE, RULES, TEXT, batch_of, ids_of
from torch import Tensor

from aki_megatron.attention import AttentionMask, LayerCache, attend, attend_cached

PROMPTS = {
    "ragged": [
        [ids_of((TEXT, 3), (IMAGE, 9), (TEXT, 6))],
        [ids_of((TEXT, 2), (IMAGE, 4), (TEXT, 2))],
        [ids_of((TEXT, 5))],
        [ids_of((IMAGE, 4), (TEXT, 2), (RESPONSE, 3), (TEXT, 4))],
    ],
    "even": [[ids_of((TEXT, 2), (IMAGE, 4), (TEXT, 3))], [ids_of((TEXT, 1), (IMAGE, 4), (TEXT, 4))]],
}


class Layers:
    """Two attention layers in float64, 4 heads over 2 key heads, with or without caches."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(16, 32, generator=generator, dtype=torch.float64) * 0.4 for _ in range(2)]

    def _heads(self, hidden: Tensor, layer: int) -> tuple[Tensor, ...]:
        return (hidden @ self.weights[layer]).unflatten(-1, (8, 4)).transpose(1, 2).split((4, 2, 2), dim=1)

    def run(self, hidden: Tensor, mask: AttentionMask, caches: list[LayerCache], lengths: Tensor) -> Tensor:
        for layer in range(2):
            q, k, v = self._heads(hidden, layer)
            if caches:
                caches[layer].fill(k, v, lengths)
            hidden = hidden + attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return hidden

    def step(self, hidden: Tensor, caches: list[LayerCache]) -> Tensor:
        for layer, cache in enumerate(caches):
            q, k, v = self._heads(hidden, layer)
            cache.append(k, v)
            hidden = hidden + attend_cached(q, cache).transpose(1, 2).flatten(2)
        return hidden


def built(modality: Tensor, segment: Tensor, rule: str, lengths: Tensor) -> AttentionMask:
    supervised = torch.arange(modality.shape[1]) >= lengths[:, None] - 1
    return AttentionMask.build(modality, segment, CONFIGS[rule], supervised=supervised & (segment >= 0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", PROMPTS)
def test_cached_decoding_equals_recomputation(case: str, rule: str) -> None:
    modality, segment = batch_of(*PROMPTS[case])
    lengths, new = (segment >= 0).sum(1), 6
    batch_size, padded_length = modality.shape
    prompt = torch.randn(batch_size, padded_length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    answers = torch.randn(batch_size, new, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model = Layers()
    caches = [LayerCache(batch_size, 2, padded_length + new, 4, dtype=torch.float64, device="cpu") for _ in range(2)]
    model.run(prompt, built(modality, segment, rule, lengths), caches, lengths)
    for count in range(1, new + 1):
        whole = torch.zeros(batch_size, padded_length + count, 16, dtype=torch.float64)
        grown_modality = torch.zeros(batch_size, padded_length + count, dtype=torch.int8)
        grown_segment = torch.full((batch_size, padded_length + count), -1, dtype=torch.int32)
        for b, length in enumerate(lengths.tolist()):
            whole[b, :length], whole[b, length : length + count] = prompt[b, :length], answers[b, :count]
            grown_modality[b, :length], grown_modality[b, length : length + count] = modality[b, :length], RESPONSE
            grown_segment[b, : length + count] = 0
        again = model.run(whole, built(grown_modality, grown_segment, rule, lengths), [], lengths)
        cached = model.step(answers[:, count - 1 : count], caches)
        wanted = again[torch.arange(batch_size), lengths + count - 1]
        torch.testing.assert_close(cached[:, 0], wanted, rtol=0, atol=1e-12)
    assert caches[0].lengths.tolist() == (lengths + new).tolist()


def test_sequences_of_other_lengths_do_not_matter() -> None:
    cache = LayerCache(2, 2, 8, 4, dtype=torch.float32, device="cpu")
    keys, values = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    cache.fill(keys, values, torch.tensor([5, 3]))
    new = torch.randn(2, 2, 1, 4)
    cache.append(new, new)
    q = torch.randn(2, 4, 1, 4)
    own_keys, own_values = torch.cat((keys[1:, :, :3], new[1:]), 2), torch.cat((values[1:, :, :3], new[1:]), 2)
    wanted = F.scaled_dot_product_attention(q[1:], own_keys, own_values, enable_gqa=True)
    torch.testing.assert_close(attend_cached(q, cache)[1:], wanted)


def test_a_full_cache_and_impossible_lengths_are_errors() -> None:
    cache = LayerCache(1, 1, 3, 4, dtype=torch.float32, device="cpu")
    keys = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="lengths"):
        cache.fill(keys, keys, torch.tensor([4]))
    cache.fill(keys, keys, torch.tensor([3]))
    with pytest.raises(ValueError, match="capacity 3"):
        cache.append(keys[:, :, :1], keys[:, :, :1])
    with pytest.raises(ValueError, match="one token"):
        attend_cached(torch.zeros(1, 1, 2, 4), cache)
