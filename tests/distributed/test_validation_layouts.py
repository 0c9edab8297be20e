"""Validation under parallel layouts: losses and answers are those of one process, and training does not notice it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MICRO_BATCHES, Setting, outcome, own_batches, rank_batches, take_steps, tiny_engine, tiny_model

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.data.pipeline import build_tokenizer
from aki_megatron.engine.inference import PHASE_PREFIX
from aki_megatron.engine.mask_consistency import MaskMismatchError
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.runner import collate_prompts
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.parallel.topology import Topology
from aki_megatron.supervise.validations import ValidationReport
from aki_megatron.synthetic.dataset import DatasetSize, write_dataset
from aki_megatron.train.build import build_engine, partition_layers
from aki_megatron.train.build_validation import build_validator, open_validation_set
from aki_megatron.types import IGNORE, ControlRequest, stack_ids

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
VALIDATED = 8
"""Number of the step whose micro-batches are validated."""


def validate_between_steps(topology: Topology, setting: Setting) -> tuple[list[float], list[list[int]], bool]:
    """Return the losses and next tokens of this data rank's micro-batches after two steps of training.

    The last is whether four steps with two validations between them leave the losses and weights of four without.
    """
    phases: list[str] = []
    engine = tiny_engine(topology, setting, set_phase=phases.append)
    reports = take_steps(engine, topology, [0, 1])
    assert not any(phase.startswith(PHASE_PREFIX) for phase in phases)
    losses = engine.forward_losses(own_batches(VALIDATED, topology), check_masks=True)
    tokens = engine.next_tokens(own_batches(VALIDATED, topology))
    assert any(phase == f"{PHASE_PREFIX}forward 0" for phase in phases)
    reports += take_steps(engine, topology, [2])
    engine.forward_losses(own_batches(VALIDATED, topology))
    reports += take_steps(engine, topology, [3])
    alone = tiny_engine(topology, setting)
    with_validation, without = outcome(engine, reports), outcome(alone, take_steps(alone, topology, range(4)))
    same = with_validation.losses == without.losses and with_validation.norms == without.norms
    same &= all(torch.equal(weight, without.weights[name]) for name, weight in with_validation.weights.items())
    return losses, tokens, same


def plain_validation(setting: Setting) -> tuple[list[float], list[list[int]]]:
    """The same of one process without an engine: losses and next tokens of all micro-batches."""
    from tiny import reference_training

    model = tiny_model(setting)
    model.load_state_dict(reference_training(range(2), setting).weights, strict=False)
    losses, tokens = [], []
    with torch.no_grad():
        for batch in rank_batches(VALIDATED, 0, 1):
            losses.append(float(model(batch.token_ids, stack_ids(batch), batch.media)))
            logits = model.logits(batch.token_ids, stack_ids(batch), batch.media)
            tokens.append(logits[batch.targets != IGNORE].argmax(-1).tolist())
    return losses, tokens


LAYOUTS = [
    pytest.param(1, 1, 1, Setting(zero_stage=0), id="one process"),
    pytest.param(8, 2, 2, Setting(zero_stage=3), id="TP2 x PP2 x DP2, ZeRO-3"),
    pytest.param(4, 1, 2, Setting(zero_stage=2, virtual_stages=2, tied=True), id="interleaved x DP2, ZeRO-2, tied"),
    pytest.param(2, 1, 1, Setting(zero_stage=1, recompute=True), id="DP2, ZeRO-1, recompute"),
    pytest.param(4, 2, 2, Setting(zero_stage=0, virtual_stages=2), id="TP2 x interleaved, ZeRO-0"),
    pytest.param(2, 1, 1, Setting(zero_stage=3, offload=True), id="DP2, ZeRO-3, offload"),
]


@pytest.mark.parametrize(("ranks", "tensor", "pipeline", "setting"), LAYOUTS)
def test_losses_and_next_tokens_are_those_of_one_process(run_on, ranks, tensor, pipeline, setting):
    results = run_on(ranks, validate_between_steps, setting, tensor=tensor, pipeline=pipeline)
    assert all(same for _, _, same in results), "training noticed the validation"
    data = ranks // (tensor * pipeline)
    losses: list[Any] = [None] * MICRO_BATCHES
    tokens: list[Any] = [None] * MICRO_BATCHES
    for rank, (own_losses, own_tokens, _) in enumerate(results):
        data_rank = rank // tensor % data
        for number, loss, found in zip(range(data_rank, MICRO_BATCHES, data), own_losses, own_tokens, strict=True):
            assert losses[number] in (None, loss) and tokens[number] in (None, found), "equal on all ranks of a replica"
            losses[number], tokens[number] = loss, found
    want_losses, want_tokens = plain_validation(setting)
    assert losses == pytest.approx(want_losses, rel=1e-5, abs=1e-6)
    assert tokens == want_tokens and sum(map(len, tokens)) > 20


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_bf16_training_does_not_notice_validation(run_on, zero_stage):
    setting = Setting(zero_stage=zero_stage, precision="bf16")
    results = run_on(4, validate_between_steps, setting, tensor=1, pipeline=2)
    assert all(same for _, _, same in results)
    want, _ = plain_validation(replace(setting, precision="fp32"))
    got = [loss for data_rank in range(2) for loss in results[data_rank][0]]
    wanted = [want[number] for data_rank in range(2) for number in range(data_rank, MICRO_BATCHES, 2)]
    assert got == pytest.approx(wanted, rel=0.02)


def validate_with_a_wrong_mask(topology: Topology) -> str:
    from aki_megatron.config.attention import AttentionConfig

    engine = tiny_engine(topology, Setting())
    if topology.pipeline_rank == 1:
        engine._stages[0].module.attention = AttentionConfig(rule="causal")
    engine.forward_losses(own_batches(VALIDATED, topology))
    try:
        engine.forward_losses(own_batches(VALIDATED, topology), check_masks=True)
    except MaskMismatchError as error:
        return str(error)
    return ""


def test_masks_of_a_validation_are_compared(run_on):
    assert all("different attention masks" in text for text in run_on(2, validate_with_a_wrong_mask, pipeline=2))


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo_data")
    write_dataset(root, DatasetSize(24, 16), lambda done: None)
    return root


def demo_run(root: Path, *flags: str) -> RunConfig:
    config = ROOT / "configs/demo/sft.yaml"
    arguments = [
        "--config", str(config), "--data.root", str(root), "--data.tokenizer", str(root / "tokenizer"),
        "--model.decoder.num_layers", "4", "--train.global_batch_size", "16", "--validation.interval", "2",
        "--validation.samples", "9", "--validation.generate", "3", "--validation.max_new_tokens", "3",
        "--train.micro_batch_size", "4", *flags,
    ]  # fmt: skip
    return load_run(arguments, default_config=config, prog="sft.py", description="")


def widen_logits(stage: Stage) -> None:
    """Answers of random weights would be one token for ever; the largest logits vary with larger weights."""
    with torch.no_grad():
        for name, weight in stage.named_parameters():
            if name.startswith("layers") and weight.dim() > 1:
                weight.mul_(4.0)


def validate_demo(topology: Topology, config: RunConfig) -> ValidationReport | None:
    tokenizer = build_tokenizer(config)
    validation_set = open_validation_set(config, tokenizer, topology, lambda line: None)
    engine = build_engine(config, partition_layers(config), topology, init_weights=widen_logits)
    checkpointer = Checkpointer(Path("unused"), keep_last=1)
    validator = build_validator(
        config,
        engine,
        tokenizer,
        topology,
        validation_set,
        checkpointer,
        lambda: ControlRequest.NONE,
        lambda phase: None,
    )
    assert validator is not None
    state = torch.get_rng_state()
    report = validator.run(2)
    assert torch.equal(torch.get_rng_state(), state), "validation draws no random number of training"
    return report


def generate_alone(config: RunConfig) -> dict[str, str]:
    """The answer to the first question of each source by the whole model with a cache: evaluate/generate.py."""
    from aki_megatron.data.media import media_decoders
    from aki_megatron.data.pipeline import build_template
    from aki_megatron.data.validation_set import build_validation_set
    from aki_megatron.evaluate.runner import read_prompt

    tokenizer = build_tokenizer(config)
    template = build_template(config, tokenizer)
    samples = build_validation_set(
        config, tokenizer, world_size=1, data_rank=0, data_size=1, pin_memory=False, progress=lambda line: None
    )
    model = build_model(config.model, attention=config.attention, seed=config.train.seed)
    widen_logits(model)
    size, decoders = config.model.vision.image_size, media_decoders(config.model)
    prompts = [read_prompt(samples.question(name, 0), template, decoders) for name in samples.sources]
    batch = collate_prompts(prompts, template, size)
    answers = generate(model, batch, stop_ids=tokenizer.stop_ids, max_new_tokens=config.validation.max_new_tokens)
    return {name: tokenizer.decode(ids).strip() for name, ids in zip(samples.sources, answers, strict=True)}


DEMO_LAYOUTS = [
    pytest.param(8, 2, 2, ("--parallel.zero_stage", "3"), id="TP2 x PP2 x DP2, ZeRO-3"),
    pytest.param(4, 1, 2, ("--parallel.zero_stage", "0", "--parallel.virtual_stages", "2"), id="interleaved x DP2"),
]
PACKED = (
    "--data.packing.enabled", "true", "--data.packing.sequence_length", "160", "--data.packing.max_images", "4",
)  # fmt: skip


def assert_same(got: ValidationReport, want: ValidationReport) -> None:
    assert got.sources.keys() == want.sources.keys()
    for name, source in got.sources.items():
        assert source.loss == pytest.approx(want.sources[name].loss, rel=1e-5, abs=1e-6)
        assert replace(source, loss=0.0) == replace(want.sources[name], loss=0.0)


@pytest.mark.parametrize("packing", [(), PACKED], ids=["unpacked", "packed"])
def test_a_validation_is_the_same_under_every_layout(run_on, demo_data, packing):
    flags = ["--parallel.zero_stage", "0", *packing]
    (alone,) = run_on(1, validate_demo, demo_run(demo_data, *flags))
    assert list(alone.sources) == ["vqav2", "vsr", "aokvqa", "refcoco"]
    assert all(source.questions == 3 for source in alone.sources.values())
    assert [source.samples for source in alone.sources.values()] == [9, 8, 9, 9], "all of vsr, which has 8"
    assert alone.bad_samples == 0
    answers = generate_alone(demo_run(demo_data, *flags))
    assert {name: source.example.generated_answer for name, source in alone.sources.items()} == answers
    assert len(set(answers.values())) > 1
    for layout in DEMO_LAYOUTS[: 1 if packing else 2]:
        ranks, tensor, pipeline, flags = layout.values
        sizes = ("--parallel.tensor", str(tensor), "--parallel.pipeline", str(pipeline))
        config = demo_run(demo_data, *packing, *flags, *sizes)
        results = run_on(ranks, validate_demo, config, tensor=tensor, pipeline=pipeline)
        assert_same(results[0], alone)
        assert {(report.loss, report.accuracy) for report in results} == {(results[0].loss, results[0].accuracy)}


def test_unpacked_and_packed_validation_agree(run_on, demo_data):
    losses = []
    for packing in ((), PACKED):
        (report,) = run_on(1, validate_demo, demo_run(demo_data, "--parallel.zero_stage", "0", *packing))
        losses.append([source.loss for source in report.sources.values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
