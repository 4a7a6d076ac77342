"""RUN/model: the trained model as a plain Hugging Face folder, with a card that says how it was made."""

import copy
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers.utils import logging

import bert_fast
from bert_fast.data.tokenizer import save_tokenizer, tokenizer_contents
from bert_fast.model import BertForPreTraining
from bert_fast.run.config import PretrainConfig, flag, phases


def export(
    run: Path,
    model: BertForPreTraining,
    tokenizer: Tokenizer,
    config: PretrainConfig,
    *,
    manifest: dict,
    state: dict,
) -> Path:
    """Writes RUN/model, aside first, and returns it.

    ``transformers.BertForPreTraining.from_pretrained(RUN/model)`` gives the outputs of ``model``. ``manifest`` is
    that of the prepared data, ``state`` the last checkpoint's.
    """
    folder, aside, before = run / "model", run / ".model", run / ".model-before"
    for leftover in (aside, before):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        with _no_progress_bar():
            model.save_pretrained(aside)
        save_tokenizer(tokenizer, aside, max_length=model.config.max_position_embeddings)
        (aside / "README.md").write_text(model_card(model, config, manifest, state), encoding="utf-8")
        if folder.exists():
            os.rename(folder, before)
        os.rename(aside, folder)
    except SafetensorError as error:  # how safetensors tells of a disk that cannot be written
        raise OSError(f"{folder} was not written: {error}; the last checkpoint is whole") from error
    finally:
        for leftover in (aside, before):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def description(model: BertForPreTraining, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that make a folder with the float32 weights of ``model`` a Hugging Face folder, by name."""
    made = copy.deepcopy(model.config)
    made.architectures, made.dtype = [type(model).__name__], "float32"
    files = {"config.json": made.to_json_string().encode()}
    return files | tokenizer_contents(tokenizer, max_length=made.max_position_embeddings)


@contextmanager
def _no_progress_bar():
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def model_card(model: BertForPreTraining, config: PretrainConfig, manifest: dict, state: dict) -> str:
    """The README.md of the model: data, steps, results."""
    made = model.config
    size = f"{made.num_hidden_layers} layers, hidden size {made.hidden_size}, {made.num_attention_heads} heads"
    files = [name for name, _ in manifest["made_by"]["files"]]
    named = ", ".join(files[:10]) + (f" and {len(files) - 10} more" if len(files) > 10 else "")
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        "tags: [bert, bert_fast]",
        "---",
        "",
        "# A BERT pre-trained with bert_fast",
        "",
        f"{size}, a vocabulary of {made.vocab_size}, {model.num_parameters():,} parameters; it loads with",
        "`transformers.BertForPreTraining.from_pretrained(...)` and with `bert_fast`'s class of the same name.",
        "",
        "## Data",
        "",
        f"{manifest['documents']:,} documents, {manifest['sentences']:,} sentences, {manifest['tokens']:,} tokens "
        f"({manifest['duplicate_documents']:,} duplicate documents left out), from {named}.",
        "",
        "## Training",
        "",
        f"{state['step']:,} updates, "
        + ("masked language modelling and next-sentence prediction" if config.nsp else "masked language modelling")
        + (" (whole words)" if config.whole_word else "")
        + (f", from {config.init_from}" if config.init_from else "")
        + ":",
        "",
        *(f"- updates {p.first + 1:,} to {p.last:,}: {p.seq} tokens, {p.batch_size} sequences" for p in phases(config)),
        "",
        "| option | value |",
        "|---|---|",
    ]
    shown = ("optimizer", "lr", "warmup", "schedule", "beta1", "beta2", "eps", "weight_decay", "clip", "seed")
    lines += [f"| `{flag(name)}` | {getattr(config, name)} |" for name in shown]
    lines += [f"| precision | {state['precision']} |", "", "## Results", ""]
    if state["validation"] is None:
        lines.append("Not validated: no documents were held out.")
    else:
        lines += [f"On held-out documents, {state['validation']['sequences']:,} sequences:", "", "| | |", "|---|---|"]
        lines += [
            f"| {key.replace('_', ' ')} | {value:.4f} |" for key, value in state["validation"].items()
            if isinstance(value, float)
        ]  # fmt: skip
    lines += ["", f"Made with bert_fast {bert_fast.__version__}."]
    return "\n".join(lines) + "\n"
