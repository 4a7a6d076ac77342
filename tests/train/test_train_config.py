"""Options: flags, files, the resolved configuration, and what is refused."""

import argparse
import json

import pytest

from bert_fast.cli import pretrain as command
from bert_fast.train.config import ConfigError, PretrainConfig, fields, flag, read_config, resolve

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
        ('{"data": "d", "out": "r", "dropout": 1}', "--dropout must be at least 0 and below 1"),
        ('{"out": "r"}', "--data and --out"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve({}, path)


def test_no_file():
    with pytest.raises(ConfigError, match="no configuration file"):
        read_config("nowhere.toml")


def test_wrong_options_are_exit_code_two(capsys):
    options = parsed("--data", "d", "--out", "r", "--steps", "0", "--quiet")
    options.command = "pretrain"
    assert options.run(options) == 2
    assert "--steps must be at least 1" in capsys.readouterr().err
