"""Tensor-parallel layers against local ones: same weights, same loss, same gradients, no tensor of vocabulary size."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.model.linears import LinearFactory
from aki_megatron.model.sharding import ShardSpec, shard_spec, shard_tensor, unshard_tensor
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.parallel.megatron import TensorParallelLinears, build_linears
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality, stack_ids

pytestmark = pytest.mark.distributed

LAYERS, NUM_LATENTS, IMAGE_SIZE, TOKENS = 2, 3, 8, 21
VOCAB_SIZE, NUM_ADDED_TOKENS, PADDED_VOCAB_SIZE = 19, 2, 40
"""Vocabulary ranges 0-19 | 20-39 on two ranks, 0-9 | 10-19 | 20-29 | 30-39 on four: the added tokens 19 and 20 are on
two of them, and the last of four ranks holds padding only."""
TENSOR_RANKS = pytest.mark.parametrize("tensor", [2, 4])


def config_of(*, tied: bool = False, bias: bool = True, extra: int = NUM_ADDED_TOKENS) -> ModelConfig:
    """Eight query heads share four keys."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=IMAGE_SIZE, patch_size=4, hidden_size=12, num_layers=1, num_heads=2, intermediate_size=18
        ),
        resampler=ResamplerConfig(num_latents=NUM_LATENTS, num_layers=1, num_heads=2, head_dim=6, mlp_ratio=2),
        decoder=DecoderConfig(
            hidden_size=48,
            num_layers=LAYERS,
            num_heads=8,
            num_kv_heads=4,
            intermediate_size=28,
            padded_vocab_size=PADDED_VOCAB_SIZE,
            vocab_size=VOCAB_SIZE,
            num_added_tokens=extra,
            lm_head_bias=bias,
            tie_word_embeddings=tied,
            rope=RopeConfig(rope_type="default", short_factor=(), long_factor=()),
        ),
    )


def draw_batch(*, seed: int = 0, images: bool = True, supervised: bool = True) -> Batch:
    """Two rows: two segments packed, the second without an image; one segment and padding."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.arange(VOCAB_SIZE + NUM_ADDED_TOKENS).repeat(2)
    token_ids = tokens[torch.randperm(len(tokens), generator=draw)[: 2 * TOKENS]].view(2, TOKENS)
    modality_ids = torch.full((2, TOKENS), Modality.PAD, dtype=torch.int8)
    segment_ids = torch.full((2, TOKENS), NO_SEGMENT, dtype=torch.int32)
    position_ids = torch.zeros(2, TOKENS, dtype=torch.int32)
    targets = torch.full((2, TOKENS), IGNORE)
    for row, segment, first, response, last, image in (
        (0, 0, 0, 8, 12, True),
        (0, 1, 12, 14, 20, False),
        (1, 0, 0, 7, 18, True),
    ):
        modality_ids[row, first:response] = Modality.TEXT
        modality_ids[row, response:last] = Modality.RESPONSE
        if image and images:
            modality_ids[row, first + 1 : first + 1 + NUM_LATENTS] = Modality.IMAGE
        segment_ids[row, first:last] = segment
        position_ids[row, first:last] = torch.arange(last - first, dtype=torch.int32)
        if supervised:
            targets[row, response - 1 : last - 1] = token_ids[row, response:last]
    pixels = torch.randn(2 if images else 0, 3, IMAGE_SIZE, IMAGE_SIZE, generator=draw)
    return Batch(token_ids, modality_ids, segment_ids, position_ids, targets, {Modality.IMAGE: pixels})


BATCHES = {
    "whole": draw_batch(),
    "without image": draw_batch(seed=1, images=False),
    "without supervised token": draw_batch(seed=2, supervised=False),
}

Gradients = dict[str, dict[str, Tensor]]
"""Batch -> parameter -> gradient; the loss is there as a parameter of its own."""


def build(config: ModelConfig, linears: LinearFactory | None = None) -> Stage:
    return build_model(config, attention=AttentionConfig(rule="mma"), seed=3, linears=linears)


def gradients(model: Stage, batches: dict[str, Batch] = BATCHES) -> Gradients:
    found: Gradients = {}
    weight = next(model.parameters())
    for name, batch in batches.items():
        batch = batch.to(weight.device)
        model.zero_grad()
        loss = model(batch.token_ids, stack_ids(batch), {Modality.IMAGE: batch.media[Modality.IMAGE].to(weight.dtype)})
        loss.backward()
        found[name] = {"loss": loss.detach().cpu()}
        for parameter, value in model.named_parameters():
            if value.requires_grad:
                found[name][parameter] = value.grad.cpu()
    return found


def tensor_gradients(
    topology: Topology,
    config: ModelConfig,
    dtype: torch.dtype = torch.float64,
    recompute: bool = False,
    factory: Callable[[Topology], LinearFactory] = build_linears,
    batches: dict[str, Batch] = BATCHES,
) -> Gradients:
    model = build(config, factory(topology)).to(topology.device, dtype)
    model.recompute = recompute
    return gradients(model, batches)


def plain_gradients(
    config: ModelConfig, dtype: torch.dtype = torch.float64, batches: dict[str, Batch] = BATCHES
) -> Gradients:
    return gradients(build(config).to(dtype), batches)


@dataclass
class Gap:
    """Largest relative L2 errors over ranks and batches: of any parameter or loss, of the loss, of all together."""

    each: float = 0.0
    loss: float = 0.0
    all: float = 0.0


def compare(shards: list[Gradients], plain: Gradients, config: ModelConfig) -> Gap:
    """Compare the results of tensor ranks with the shards of the local result; zeros must be zeros."""
    gap = Gap()
    for batch, wanted in plain.items():
        for rank, shard in enumerate(shards):
            assert shard[batch].keys() == wanted.keys()
            errors, sizes = [], []
            for name, whole in wanted.items():
                want = shard_tensor(whole, shard_spec(name, config.decoder), rank, len(shards))
                error, size = float((shard[batch][name] - want).norm()), float(want.norm())
                assert math.isfinite(error), f"{name} of {batch} is not finite"
                assert size or not error, f"{name} of {batch} must be 0"
                relative = error / size if size else 0.0
                gap.each = max(gap.each, relative)
                if name == "loss":
                    gap.loss = max(gap.loss, relative)
                else:
                    errors.append(error)
                    sizes.append(size)
            gap.all = max(gap.all, math.hypot(*errors) / (math.hypot(*sizes) or 1.0))
    return gap


# the same weights


def weights_of(topology: Topology, config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    model = build(config, build_linears(topology))
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    state = model.state_dict()
    moved = {name: value + 1 for name, value in state.items()}
    model.load_state_dict(moved)  # strict
    loaded = all(torch.equal(value, moved[name]) for name, value in model.state_dict().items())
    return weights, state, loaded


@TENSOR_RANKS
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_the_shards_of_the_local_ones_bit_for_bit(run_on, tensor, tied):
    config = config_of(tied=tied)
    plain = build(config)
    found = run_on(tensor, weights_of, config, tensor=tensor)
    for name, whole in plain.named_parameters():
        spec = shard_spec(name, config.decoder)
        shards = [weights[name] for weights, _, _ in found]
        assert all(torch.equal(shard_tensor(whole, spec, rank, tensor), shard) for rank, shard in enumerate(shards)), (
            name
        )
        assert torch.equal(unshard_tensor(shards, spec), whole), name
        assert (spec is None) == (shards[0].shape == whole.shape), name
    for weights, state, loaded in found:
        assert list(weights) == [name for name, _ in plain.named_parameters()]
        assert list(state) == list(plain.state_dict()), "no entry of Megatron's own"
        assert loaded


# the same loss and gradients


@TENSOR_RANKS
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_every_gradient_equal_the_plain_ones(run_on, record_property, tensor, tied, bias, recompute):
    """In fp64, where rounding hides nothing."""
    config = config_of(tied=tied, bias=bias)
    plain = plain_gradients(config)
    assert plain["whole"]["loss"] > 1
    assert all(not value.any() for value in plain["without supervised token"].values())
    assert not plain["without image"]["input_embedder.resampler.latents"].any()
    gap = compare(run_on(tensor, tensor_gradients, config, torch.float64, recompute, tensor=tensor), plain, config)
    record_property("largest_relative_error", gap.each)
    assert gap.each <= 1e-12


@TENSOR_RANKS
@pytest.mark.parametrize("tied", [False, True])
def test_fp32(run_on, record_property, tensor, tied):
    """Single parameters lose digits where large terms cancel, with plain layers as well."""
    config = config_of(tied=tied)
    shards = run_on(tensor, tensor_gradients, config, torch.float32, tensor=tensor)
    gap = compare(shards, plain_gradients(config, torch.float32), config)
    record_property("largest_relative_errors", vars(gap))
    assert gap.loss <= 1e-6
    assert gap.all <= 2e-6  # as far as the plain ones are from fp64
    assert gap.each <= 1e-5


@TENSOR_RANKS
def test_bf16_errs_at_most_twice_as_much_as_the_plain_layers_in_bf16(run_on, tensor):
    config = config_of()
    exact, plain = plain_gradients(config), plain_gradients(config, torch.bfloat16)
    shards = run_on(tensor, tensor_gradients, config, torch.bfloat16, tensor=tensor)
    joined = {
        batch: {
            name: unshard_tensor([shard[batch][name] for shard in shards], shard_spec(name, config.decoder))
            for name in exact[batch]
        }
        for batch in exact
    }

    def error(got: Gradients) -> float:
        gaps = [(got[batch][name].double() - exact[batch][name]).norm() for batch in exact for name in exact[batch]]
        return float(torch.stack(gaps).norm())

    assert joined["whole"]["loss"].dtype == torch.float32
    assert 0 < error(joined) <= 2 * error(plain)


def test_without_added_tokens(run_on):
    config, batch = config_of(extra=0), draw_batch()
    clamped = {name: getattr(batch, name).clamp(max=VOCAB_SIZE - 1) for name in ("token_ids", "targets")}
    batches = {"without added tokens": dataclasses.replace(batch, **clamped)}
    shards = run_on(2, tensor_gradients, config, torch.float64, False, build_linears, batches, tensor=2)
    assert compare(shards, plain_gradients(config, batches=batches), config).each <= 1e-12


def test_two_replicas_of_two_tensor_ranks_do_not_mix(run_on):
    config = config_of()
    plain = plain_gradients(config)
    shards = run_on(4, tensor_gradients, config, tensor=2)
    assert compare(shards[:2], plain, config).each <= 1e-12
    assert compare(shards[2:], plain, config).each <= 1e-12


class ChunkedLinears(TensorParallelLinears):
    """The mistake of sharding a fused tensor by plain chunks."""

    def column(self, in_features, out_features, *, bias, std, part_sizes=()):
        return super().column(in_features, out_features, bias=bias, std=std)


class UnsummedLinears(TensorParallelLinears):
    """The mistake of taking the gradient of the rank's own vocabulary range for the whole."""

    def copy_to_tensor_parallel_region(self, x):
        return x


@pytest.mark.parametrize("mistake", [ChunkedLinears, UnsummedLinears])
def test_the_comparison_sees_a_mistake(run_on, mistake):
    config = config_of()
    shards = run_on(2, tensor_gradients, config, torch.float32, False, mistake, tensor=2)
    assert compare(shards, plain_gradients(config, torch.float32), config).all > 1e-2


# no rank holds the whole vocabulary


class Shapes(TorchDispatchMode):
    """Writes down the shapes in every collective, and the largest last dimension of anything computed."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, list[torch.Size]]] = []
        self.last_dimensions: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        seen = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        self.last_dimensions |= {leaf.shape[-1] for leaf in seen if leaf.dim()}
        if func.namespace == "c10d":
            self.collectives.append((func.overloadpacket.__name__, [leaf.shape for leaf in seen]))
        return out


def watch(topology: Topology, config: ModelConfig) -> list[tuple[list[tuple[str, list[torch.Size]]], set[int]]]:
    """What a forward and backward pass exchanges, and what gathering its logits would."""
    model = build(config, build_linears(topology)).to(topology.device)
    batch = draw_batch().to(topology.device)
    with Shapes() as seen:
        model(batch.token_ids, stack_ids(batch), batch.media).backward()
    logits = model.logits(batch.token_ids, stack_ids(batch), batch.media).detach()
    with Shapes() as gathering:
        everyone = [torch.empty_like(logits) for _ in range(topology.tensor)]
        dist.all_gather(everyone, logits, group=topology.tensor_group)
        torch.cat(everyone, -1)
    return [(shapes.collectives, shapes.last_dimensions) for shapes in (seen, gathering)]


@TENSOR_RANKS
def test_no_collective_and_no_tensor_has_the_whole_vocabulary(run_on, tensor):
    for (collectives, last_dimensions), (gathered, whole) in run_on(tensor, watch, config_of(), tensor=tensor):
        forward = 1 + 2 * LAYERS + 2  # embedding, two row layers in each layer, loss
        backward = 2 * LAYERS + 3  # two column layers in each layer; head: input, added tokens, their bias
        assert [name for name, _ in collectives] == ["allreduce_"] * (forward + backward)
        lasts = {shape[-1] for _, shapes in collectives for shape in shapes}
        assert not lasts & {PADDED_VOCAB_SIZE, PADDED_VOCAB_SIZE // tensor}
        assert PADDED_VOCAB_SIZE not in last_dimensions
        assert PADDED_VOCAB_SIZE // tensor in last_dimensions
        # and this would be seen
        assert PADDED_VOCAB_SIZE // tensor in {shape[-1] for _, shapes in gathered for shape in shapes}
        assert PADDED_VOCAB_SIZE in whole


def logits_of(topology: Topology, config: ModelConfig) -> Tensor:
    model = build(config, build_linears(topology)).to(topology.device)
    batch = draw_batch().to(topology.device)
    with torch.no_grad():
        return model.logits(batch.token_ids, stack_ids(batch), batch.media).cpu()


@TENSOR_RANKS
def test_logits_are_those_of_the_vocabulary_range_of_a_rank(run_on, tensor):
    config, batch = config_of(), draw_batch()
    with torch.no_grad():
        whole = build(config).logits(batch.token_ids, stack_ids(batch), batch.media)
    joined = unshard_tensor(run_on(tensor, logits_of, config, tensor=tensor), ShardSpec(2, (PADDED_VOCAB_SIZE,)))
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-6)
    assert joined[..., VOCAB_SIZE + NUM_ADDED_TOKENS :].eq(-torch.inf).all()


# and quietly


def warnings_of_a_pass(topology: Topology) -> list[str]:
    build_linears(topology)._megatron.linear.warned = False  # as in a process that has just started
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensor_gradients(topology, config_of())
    return [str(warning.message) for warning in caught]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Megatron's advice about CUDA is left to be read")
def test_a_pass_on_the_cpu_warns_of_nothing(run_on):
    assert run_on(2, warnings_of_a_pass, tensor=2) == [[], []]
