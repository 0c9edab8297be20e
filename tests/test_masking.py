"""Secrets of commands and URLs: masked wherever they leave the process, and still comparable in a saved run."""

import copy
import logging
from pathlib import Path

import pytest
import yaml

from aki_megatron.config.field_info import format_value
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import check_resume, dump_run, load_saved, public_values
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.masking import is_masked, mask_command, mask_text, mask_values
from aki_megatron.supervise.secondary_failures import format_error
from aki_megatron.train.main import MaskingFormatter

PRETRAIN = Path(__file__).resolve().parents[1] / "configs/demo/pretrain.yaml"

COMMANDS = [
    ('curl -s -H "Authorization: Bearer s3cr3t.jwt" https://h/{0..9}.tar', "curl -s -H *** https://h/{0..9}.tar"),
    ("curl https://bob:hunter22@h/x.tar -o -", "curl https://***@h/x.tar -o -"),
    ("curl -u bob:hunter22 https://h/x.tar", "curl -u *** https://h/x.tar"),
    ("curl -ubob:hunter22 https://h/x.tar", "curl -u*** https://h/x.tar"),
    ("curl 'https://h/x.tar?X-Amz-Signature=abcdef&part=1'", "curl 'https://h/x.tar?X-Amz-Signature=***&part=1'"),
    ("wget --header='X-Auth: abcdef' https://h/x -O -", "wget --header=*** https://h/x -O -"),
    ("AWS_SECRET_ACCESS_KEY=abcd/efg+h aws s3 cp s3://b/x.tar -", "AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/x.tar -"),
    ("az download --account-key ab3Cd== --name c", "az download --account-key *** --name c"),
    ("python fetch.py --token=abc123xyz {0..3}", "python fetch.py --token=*** {0..3}"),
    ("sshpass -p geheim7 scp h:/x.tar /dev/stdout", "sshpass -p *** scp h:/x.tar /dev/stdout"),
    ("curl https://h/hf_abcdEFGH1234abcdEFGH1234/x.tar", "curl https://h/hf_***/x.tar"),
    ('sh -c "curl -u a:b https://h"', 'sh -c "***"'),
    ("curl -u 'a:b https://h", "***"),
]

PLAIN = [
    "aws s3 cp s3://bucket/{00000..00010}.tar -",
    "aws s3 cp --profile prod --region us-east-1 s3://bucket/x.tar -",
    "curl -sSfL --retry 5 https://h/{0..9}.tar | gzip -d",
    'curl -H "Authorization: Bearer $TOKEN" https://h/x.tar',
    'curl -H "Authorization: Bearer $(cat ~/.token)" https://h/x.tar',
    "curl -u $NAME:$PASSWORD https://h/x.tar?sig=$SIG",
    "ssh host cat /data/{0..3}.tar",
    "hadoop fs -cat hdfs://n:8020/x/blip3_kale-00000-of-31000.tar",
    "gsutil -m cp gs://b/x.tar -",
]
"""Commands without a secret: config.yaml repeats them as they are."""


@pytest.mark.parametrize(("command", "masked"), COMMANDS)
def test_secrets_of_commands(command: str, masked: str) -> None:
    assert mask_command(command) == masked
    saved = mask_values(f"pipe:{command}", digests=True)
    assert is_masked(saved) and saved.startswith(f"pipe:{masked} [masked ")
    assert mask_values(saved, digests=True) == saved


@pytest.mark.parametrize("command", PLAIN)
def test_commands_without_secrets_stay(command: str) -> None:
    assert mask_values([f"pipe:{command}", {"a": 1}], digests=True) == [f"pipe:{command}", {"a": 1}]


def test_secrets_in_any_text() -> None:
    mask_command("curl -u bob:hunter22 https://h/x.tar")
    for text in ("401 for bob:hunter22", "password hunter22 is wrong", "GET https://a:b@h/?token=abcdefghijklmnop"):
        masked = mask_text(text)
        assert "***" in masked and "hunter22" not in masked and "a:b" not in masked and "abcdefghij" not in masked
    for text in (
        "Authorization: Bearer xyz",
        "AWS_SECRET_ACCESS_KEY=xyz",
        "key AKIAABCDEFGHIJKLMNOP",
        "--password xyz",
    ):
        assert "xyz" not in mask_text(text) and "AKIA" not in mask_text(text)
    for text in (
        "data.max_text_tokens=512",
        "see https://arxiv.org/abs/2503.02597",
        "model.decoder.num_added_tokens: 3",
    ):
        assert mask_text(text) == text


SECRET = "correct-horse-7"
SHARDS = f"pipe:curl -u user:{SECRET} https://h/{{00000..00007}}.tar"


def load(*flags: str, config: Path = PRETRAIN) -> RunConfig:
    return load_run(["--config", str(config), *flags], default_config=PRETRAIN, prog="", description="")


def with_secret(secret: str = SECRET) -> RunConfig:
    return load("--data.captions", f"[{{name: kale, shards: ['{SHARDS.replace(SECRET, secret)}']}}]")


def test_a_saved_run_holds_no_secret_and_is_still_compared(tmp_path: Path) -> None:
    saved, run = tmp_path / "config.yaml", with_secret()
    saved.write_text(dump_run(run))
    assert run.data.captions[0].shards == (SHARDS,)
    assert SECRET not in saved.read_text() and "curl -u *** https://h/" in saved.read_text()
    assert check_resume(saved, run) == []
    assert dump_run(load_saved(saved)) == dump_run(run)
    with pytest.raises(ConfigError, match=r"data\.captions\[0\]\.shards was .*\*\*\*.* when the run started") as caught:
        check_resume(saved, with_secret("other-horse-81"))
    assert SECRET not in str(caught.value) and "horse" not in str(caught.value)


def test_a_masked_setting_must_be_given_again(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_run(with_secret()))
    with pytest.raises(
        ConfigError, match=r"data\.captions\.0\.shards held a secret.*--data\.captions.*\$TOKEN"
    ) as caught:
        load(config=saved)
    assert "\n" not in str(caught.value)
    again = load("--data.captions", f"[{{name: kale, shards: ['{SHARDS}']}}]", config=saved)
    assert check_resume(saved, again) == []


def test_a_command_that_names_a_variable_is_repeated(tmp_path: Path) -> None:
    shards = "pipe:curl -u $USER:$PASSWORD https://h/x.tar"
    run = load("--data.captions", f"[{{name: kale, shards: ['{shards}']}}]")
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_run(run))
    assert load(config=saved) == run


def test_trackers_errors_and_logs_hold_no_secret() -> None:
    run = with_secret()
    assert SECRET not in str(public_values(run)) and "[masked" not in str(public_values(run))
    assert SECRET not in format_value(SHARDS) and SECRET not in format_value({"shards": [SHARDS]})
    error = DataError(f"{SHARDS} failed with exit code 22: curl: (22) user:{SECRET} was refused")
    for text in (str(error), format_error(error), format_error(RuntimeError(str(SECRET)))):
        assert SECRET not in text and "***" in text
    assert SECRET not in str(copy.copy(error))
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", (SHARDS,), None)
    assert SECRET not in MaskingFormatter("%(message)s").format(record)


def test_a_wrong_setting_beside_a_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load("--data.captions", f"[{{name: kale, shards: ['{SHARDS}'], weight: x}}]", "--train.steps", "0")
    assert SECRET not in str(caught.value) and "weight must be" in str(caught.value)
    values = yaml.safe_load(dump_run(load()))
    values["data"]["captions"] = [{"name": "kale", "shards": SHARDS}]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="shards must be") as caught:
        load(config=file)
    assert SECRET not in str(caught.value)
