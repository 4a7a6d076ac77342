"""RUN/model: the trained model as a plain Hugging Face folder, with a card that says how it was made."""

import copy
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers.utils import logging

from bert_fast.data.tokenizer import save_tokenizer, tokenizer_contents
from bert_fast.model import BertForPreTraining
from bert_fast.run.card import CURVES, model_card
from bert_fast.run.config import PretrainConfig
from bert_fast.run.sources import Source


def export(
    run: Path,
    model: BertForPreTraining,
    tokenizer: Tokenizer,
    config: PretrainConfig,
    *,
    sources: list[Source],
    state: dict,
) -> Path:
    """Writes RUN/model, aside first, and returns it.

    ``transformers.BertForPreTraining.from_pretrained(RUN/model)`` gives the outputs of ``model``. ``sources`` are
    the prepared data, ``state`` is the last checkpoint's.
    """
    folder, aside, before = run / "model", run / ".model", run / ".model-before"
    for leftover in (aside, before):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        with _no_progress_bar():
            model.save_pretrained(aside)
        save_tokenizer(tokenizer, aside, max_length=model.config.max_position_embeddings)
        card = model_card(model, tokenizer, config, sources=sources, state=state)
        (aside / "README.md").write_text(card, encoding="utf-8")
        if (run / CURVES).is_file():
            shutil.copy(run / CURVES, aside)
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
