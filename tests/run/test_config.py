"""Options: flags, files, the resolved configuration, and what is refused."""

import argparse
import json

import pytest

from bert_fast.cli import pretrain as command
from bert_fast.run.config import (
    ConfigError,
    PretrainConfig,
    effective,
    fields,
    flag,
    mask_probs,
    mask_shares,
    phases,
    read_config,
    resolve,
)

GIVEN = {"data": "d", "out": "r"}


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["pretrain", *arguments])


def flags_of(options: argparse.Namespace) -> dict:
    names = {field.name for field, _ in fields()}
    return {name: value for name, value in vars(options).items() if name in names}


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_file_round_trip(tmp_path, suffix):
    config = PretrainConfig(**GIVEN, lr=3e-4, nsp=False, phases="32:4,64:2", workers=3, precision="bf16")
    path = tmp_path / f"config.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(config.as_dict()))
    else:
        path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in config.as_dict().items()))
    assert resolve({}, path) == config


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('data = "d"\nout = "r"\nlr = 1\nbatch-size = 64\nnsp = false\n')
    flags = flags_of(parsed("--lr", "0.5", "--nsp"))
    assert flags == {"lr": 0.5, "nsp": True}
    config = resolve(flags, path)
    assert (config.lr, config.batch_size, config.nsp, config.seq) == (0.5, 64, True, 128)


@pytest.mark.parametrize(
    ("flags", "file", "message"),
    [
        ("--phases 32:4,64:2 --steps 5", None, "--steps 5 contradicts --phases 32:4,64:2, where it is 6"),
        (
            "--phases 32:4,64:2 --seq 128",
            None,
            "--seq 128 contradicts --phases 32:4,64:2, where it is 64",
        ),  # the default
        ("--steps 5", {"phases": "32:4"}, "--steps 5 contradicts"),
        ("", {"phases": "32:4", "seq": 64}, "--seq 64 contradicts"),
        ("--model base --init-from x", None, "--model base beside --init-from x"),
        ("--model base", {"init_from": "x"}, "--model base beside --init-from x"),
        ("", {"model": "tiny", "init_from": "x"}, "--model tiny beside --init-from x"),
        ("--phases 32:4,64:2 --steps 6 --seq 64", None, None),
        ("--phases 32:4", {"seq": 64, "steps": 5}, None),
        ("--init-from x", {"model": "tiny"}, None),
        (
            "",
            {"phases": "32:4", "seq": 128, "steps": 1_000_000, "model": "base", "init_from": "x"},
            None,
        ),  # as defaults are
    ],
)
def test_options_that_contradict_the_ones_in_their_place_are_wrong_usage(tmp_path, capsys, flags, file, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GIVEN | (file or {})))
    options = parsed("--config", str(path), *flags.split())
    if message is None:
        config = resolve(flags_of(options), path)
        resolve({}, _saved(config, path))
        resolve(flags_of(options), path)  # the same command again
        return
    options.command = "pretrain"
    assert options.run(options) == 2
    assert message in capsys.readouterr().err


def test_a_saved_configuration_has_no_contradiction(tmp_path):
    config = PretrainConfig(**GIVEN, phases="32:4,64:2", seq=256, steps=7, model="tiny", init_from="x")
    again = resolve({}, _saved(config, tmp_path / "config.json"))
    assert again.as_dict() | {"seq": 256, "steps": 7, "model": "tiny"} == config.as_dict()
    longer = resolve({"phases": "32:9"}, _saved(again, tmp_path / "config.json"))
    assert (longer.phases, longer.init_from) == ("32:9", "x")


def _saved(config: PretrainConfig, path):
    path.write_text(json.dumps(effective(config.as_dict())))  # as a run does
    return path


def test_every_option_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    for field, _ in fields():
        assert flag(field.name) in text
        assert field.metadata["help"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"batchsize": 3}', "unknown option batchsize"),
        ("{", "config.json"),
        ("[1]", "no table"),
        ('{"data": "d", "out": "r", "steps": "many"}', "--steps takes a whole number, got 'many'"),
        ('{"data": "d", "out": "r", "steps": true}', "--steps takes a whole number"),
        ('{"data": "d", "out": "r", "optimizer": "sgd"}', "--optimizer is one of adamw, lamb, lamb-nvidia"),
        ('{"data": "d", "out": "r", "beta1": 1.0}', "--beta1"),
        ('{"data": "d", "out": "r", "lr": NaN}', "--lr"),
        ('{"data": "d", "out": "r", "eps": Infinity}', "--eps must be finite, got inf"),
        ('{"data": "d", "out": "r", "initializer_range": Infinity}', "--initializer-range must be finite"),
        ('{"data": "d", "out": "r", "peak_tflops": Infinity}', "--peak-tflops must be finite"),
        ('{"data": "d", "out": "r", "dropout": 1}', "--dropout must be at least 0 and below 1"),
        ('{"data": "d", "out": "r", "mask_prob": "0"}', "--mask-prob must be above 0 and below 1"),
        ('{"data": "d", "out": "r", "mask_prob": "0.3:1"}', "--mask-prob must be above 0 and below 1"),
        ('{"data": "d", "out": "r", "mask_prob": "0.3:0.2:0.1"}', "--mask-prob must be a share, or two"),
        ('{"data": "d", "out": "r", "mask_prob": "much"}', "--mask-prob must be a share, or two"),
        ('{"data": "d", "out": "r", "mask_prob": true}', "--mask-prob takes text"),
        ('{"data": "d", "out": "r", "mask_shares": "80:10"}', "--mask-shares must be three percentages"),
        ('{"data": "d", "out": "r", "mask_shares": "80:30:-10"}', "--mask-shares must be three percentages"),
        ('{"data": "d", "out": "r", "mask_shares": "80:10:nan"}', "--mask-shares must be three percentages"),
        ('{"data": "d", "out": "r", "track": "wandb,,mlflow"}', "--track must be names by comma, each once"),
        ('{"data": "d", "out": "r", "track": "wandb, wandb"}', "--track must be names by comma, each once"),
        ('{"out": "r"}', "--data and --out"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve({}, path)


def test_a_masking_rate_is_a_number_or_a_course(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('data = "d"\nout = "r"\nmask_prob = 0.3\nmask_shares = "100:0:0"\n')
    config = resolve({}, path)
    assert (mask_probs(config), mask_shares(config)) == ((0.3, 0.3), (1.0, 0.0, 0.0))
    assert mask_probs(PretrainConfig(**GIVEN)) == (0.15, 0.15)
    assert mask_shares(PretrainConfig(**GIVEN)) == (0.8, 0.1, 0.1)
    long, short = phases(PretrainConfig(**GIVEN, mask_prob="0.30:0.15", phases="128:16,512:1"))
    assert [long.mask_prob(step) for step in (0, 5, 15)] == pytest.approx([0.3, 0.25, 0.15])
    assert short.mask_prob(16) == 0.3


def test_no_file():
    with pytest.raises(ConfigError, match="no configuration file"):
        read_config("nowhere.toml")


def test_wrong_options_are_exit_code_two(capsys):
    options = parsed("--data", "d", "--out", "r", "--steps", "0", "--quiet")
    options.command = "pretrain"
    assert options.run(options) == 2
    assert "--steps must be at least 1" in capsys.readouterr().err
