"""The model that a run trains: one of the published sizes, any BertConfig, or a checkpoint of transformers."""

import copy
import dataclasses
import difflib
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import BertConfig, PreTrainedConfig

from bert_fast.data import special_ids
from bert_fast.data.tokenizer import vocabulary_rows
from bert_fast.model import BertForPreTraining
from bert_fast.run.config import SIZES, ConfigError, PretrainConfig
from bert_fast.run.new_rows import base_tokenizer
from bert_fast.run.weights import UnfitWeights, read_weights

POSITIONS = 512  # as published, whatever length is trained on
WITHOUT_EFFECT = {  # in configuration files of published BERTs, without a reader in transformers today
    "directionality", "finetuning_task", "gradient_checkpointing", "output_past", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "position_embedding_type", "pruned_heads", "torchscript", "use_bfloat16",
}  # fmt: skip
NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def model_config(config: PretrainConfig, tokenizer: Tokenizer, longest: int) -> BertConfig:
    """The BertConfig of a run whose sequences have at most ``longest`` tokens; its vocabulary is the tokenizer's.

    ConfigError for a file that is none or has names that BertConfig does not know, a model with fewer positions, or a
    checkpoint of another vocabulary.
    """
    vocabulary = vocabulary_rows(tokenizer)
    if config.init_from:
        made = _checkpoint_config(config.init_from)
        if made.vocab_size < vocabulary:
            base = base_tokenizer(config.init_from, tokenizer)
            if base is None or vocabulary_rows(base) > made.vocab_size:
                raise ConfigError(
                    f"--init-from {config.init_from} has a vocabulary of {made.vocab_size}, the data's tokenizer "
                    f"{vocabulary}: prepare the data with the checkpoint's own tokenizer"
                )
            made.vocab_size = vocabulary
    elif config.model in SIZES:
        layers, hidden, heads = SIZES[config.model]
        made = BertConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=max(POSITIONS, longest),
        )
    elif Path(config.model).is_file():
        try:
            fields = json.loads(Path(config.model).read_text(encoding="utf-8"))
            made = BertConfig(**fields)
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"--model {config.model} is no BertConfig: {error}") from error
        _require_bert(f"--model {config.model}", fields.get("model_type", "bert"))  # Google's files name no type
        _require_known(config.model, made)
    else:
        raise ConfigError(f"--model {config.model} is none of {', '.join(SIZES)}, and no file")
    if not config.init_from:
        made.vocab_size, made.pad_token_id = vocabulary, special_ids(tokenizer).pad
    if made.max_position_embeddings < longest:
        raise ConfigError(f"sequences of {longest} tokens, but the model has {made.max_position_embeddings} positions")
    if config.dropout is not None:
        made.hidden_dropout_prob = made.attention_probs_dropout_prob = config.dropout
    if config.initializer_range is not None:
        made.initializer_range = config.initializer_range
    return made


def _checkpoint_config(source: str) -> BertConfig:
    """The configuration of a folder or a name on the Hub; ConfigError where there is none, or not that of a BERT."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--init-from {source} is no checkpoint of transformers: {error}") from error
    if not fields:
        raise ConfigError(f"--init-from {source} is no checkpoint of transformers: it has no config.json")
    _require_bert(f"--init-from {source}", fields.get("model_type", "bert"))
    return BertConfig.from_dict(fields)


def _require_bert(what: str, kind: str) -> None:
    if kind != "bert":
        raise ConfigError(f"{what} is a model of type {kind!r}; this engine trains BERT")


def _require_known(file: str, made: BertConfig) -> None:
    """ConfigError where ``made`` has attributes that no BertConfig has: it keeps any name, and nothing reads it."""
    extra = sorted(set(made.to_dict()) - set(BertConfig().to_dict()) - WITHOUT_EFFECT - {"return_logits"})
    if unknown := [name for name in extra if not name.startswith("_")]:
        raise ConfigError(f"--model {file}: BertConfig does not know {', '.join(map(_with_right_name, unknown))}")


def _with_right_name(name: str) -> str:
    """``name``, and the field of BertConfig that is meant where one alone has its words, or nearly its spelling."""
    known = [field.name for field in dataclasses.fields(BertConfig)]
    meant = [other for other in known if set(name.split("_")) <= set(other.split("_"))]
    meant = meant or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"{name} (did you mean {meant[0]}?)" if len(meant) == 1 else name


def comparable(config: BertConfig) -> dict:
    """The fields of ``config`` that make the model what it is, as JSON has them."""
    return {k: v for k, v in config.to_dict().items() if k not in NOT_THE_MODEL}


def new_model(config: PretrainConfig, made: BertConfig, seed: int) -> tuple[BertForPreTraining, list[str]]:
    """A model with fresh weights drawn from ``seed``, or those of ``--init-from``; and what there is to say of it.

    Heads and pooler that the checkpoint lacks are drawn; ConfigError where its other weights are not the model's own
    (see :func:`bert_fast.run.weights.read_weights`) or there are none to read. Rows beyond the checkpoint's are drawn:
    :func:`bert_fast.run.new_rows.start_new_rows` gives them what is known of their pieces.
    """
    torch.manual_seed(seed)
    if not config.init_from:
        return BertForPreTraining(made), []
    own = copy.deepcopy(made)
    own.vocab_size = _checkpoint_config(config.init_from).vocab_size
    try:
        model, missing, unused = read_weights(
            BertForPreTraining, config.init_from, optional=("cls.", "bert.pooler."), config=own, dtype=torch.float32
        )
    except OSError as error:
        raise ConfigError(f"--init-from {config.init_from}: {error}") from error
    except UnfitWeights as error:
        raise ConfigError(f"--init-from {error}") from error
    notes = []
    if missing:
        notes.append(f"{config.init_from} lacks {', '.join(missing)}: drawn at random")
    if unused:
        notes.append(f"of {config.init_from} not used: {', '.join(unused)}")
    if made.vocab_size > own.vocab_size:
        model.resize_token_embeddings(made.vocab_size, mean_resizing=False)
    return model, notes


def load_weights(model: BertForPreTraining, tensors: dict[str, torch.Tensor]) -> None:
    """Puts ``tensors`` (by the names of parameters) into ``model``; ValueError unless they are exactly its own."""
    parameters = dict(model.named_parameters())
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in (parameters, tensors)]
    if shapes[0] != shapes[1]:
        differing = sorted(name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items()))
        raise ValueError(f"the checkpoint's parameters are not the model's: {', '.join(differing)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
