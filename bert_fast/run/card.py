"""The card of a model that a run made: README.md of RUN/model, which the Hugging Face Hub shows."""

import json
import platform
from datetime import timedelta
from pathlib import Path

import tokenizers
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tokenizers import Tokenizer

import bert_fast
from bert_fast.model import BertForPreTraining
from bert_fast.run.config import PretrainConfig, effective, fields, flag, phases
from bert_fast.run.metrics import read_metrics
from bert_fast.run.sources import Source

# Options that a card has whatever they are, and those that say nothing of the model.
ALWAYS = ("optimizer", "lr", "warmup", "schedule", "beta1", "beta2", "eps", "weight_decay", "clip", "seed")
NEVER = (
    "data", "out", "workers", "peak_tflops", "log_every", "checkpoint_every", "keep", "resume", "track",
    "track_project", "push_to_hub", "hub_private",
)  # fmt: skip

MOST_ROWS = 20  # of the validations; of more, so many are shown

METRICS = {"mlm_loss": "loss", "mlm_accuracy": "accuracy", "perplexity": "perplexity"}  # ours, and the Hub's names

CURVES = "loss.png"


def model_card(
    model: BertForPreTraining, tokenizer: Tokenizer, config: PretrainConfig, *, sources: list[Source], state: dict
) -> str:
    """The README.md, for a folder that has the run's picture where the run has one: data, training, results, use.

    ``sources`` are the prepared data, ``state`` is the last checkpoint's.
    """
    name = config.push_to_hub or "path/to/this/folder"
    parts = [
        "---\n" + _metadata(config, state).to_yaml() + "\n---",
        f"# {name.rpartition('/')[2] if config.push_to_hub else 'A BERT pre-trained with bert_fast'}",
        _about(model, tokenizer),
        "## Use\n\n" + _snippets(name),
        "## Data\n\n" + _data(sources, state["read"]),
        "## Training\n\n" + _training(config, state),
        "## Results\n\n" + _results(config, state),
        f"Made with bert_fast {bert_fast.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, tokenizers {tokenizers.__version__}, Python {platform.python_version()}.",
    ]
    return str(ModelCard("\n\n".join(parts) + "\n"))


def _metadata(config: PretrainConfig, state: dict) -> ModelCardData:
    found = state["validation"] or {}
    results = [
        EvalResult(
            task_type="fill-mask", dataset_type="held-out", dataset_name="Held-out documents of the training data"
            if not config.validation_data else _public(config.validation_data), metric_type=theirs,
            metric_name=ours.replace("_", " "), metric_value=found[ours],
        )
        for ours, theirs in METRICS.items() if found.get(ours) is not None
    ]  # fmt: skip
    return ModelCardData(
        license="unknown", library_name="transformers", pipeline_tag="fill-mask", tags=["bert", "bert_fast"],
        base_model=config.init_from if config.init_from and not Path(config.init_from).exists() else None,
        model_name=(config.push_to_hub or config.out).rstrip("/").rpartition("/")[2] if results else None,
        eval_results=results or None,
    )  # fmt: skip


def _about(model: BertForPreTraining, tokenizer: Tokenizer) -> str:
    made, kind = model.config, json.loads(tokenizer.to_str())["model"]["type"]
    cased = ", lower-cased" if getattr(tokenizer.normalizer, "lowercase", False) else ""
    return (
        f"A BERT of {made.num_hidden_layers} layers, hidden size {made.hidden_size}, {made.num_attention_heads} heads, "
        f"{model.num_parameters():,} parameters, for up to {made.max_position_embeddings} tokens. Its tokenizer is "
        f"{kind} with {tokenizer.get_vocab_size():,} pieces{cased}. It loads with `transformers` and with the classes "
        "of the same names in `bert_fast`."
    )


def _snippets(name: str) -> str:
    return f"""```python
from transformers import pipeline

fill_mask = pipeline("fill-mask", model="{name}")
print(fill_mask("This is a [MASK] sentence."))
```

With `bert_fast`:

```python
import torch
from bert_fast import BertForMaskedLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = BertForMaskedLM.from_pretrained("{name}").eval()
inputs = tokenizer("This is a [MASK] sentence.", return_tensors="pt")
with torch.no_grad():
    scores = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
print(tokenizer.convert_ids_to_tokens(scores.topk(5).indices[0]))
```"""


def _data(sources: list[Source], read: list[dict]) -> str:
    unknown = "The licence of the data is unknown to the program that wrote this card, and so is the model's."
    if len(sources) == 1:
        return f"{_corpus(sources[0].manifest)}. {unknown}"
    lines = [f"- `{source.name}`, {source.share:.1%} of the tokens: {_corpus(source.manifest)}." for source in sources]
    names = [source.name for source in sources]
    for number, phase in enumerate(read, 1):
        parts = zip(names, phase["tokens"], phase["epochs"], strict=True)
        told = ", ".join(f"{name} {n / sum(phase['tokens']):.1%} in {epochs:.2f} epochs" for name, n, epochs in parts)
        lines.append(f"- tokens trained on{f' in part {number}' if len(read) > 1 else ''}: {told}.")
    return "\n".join([*lines, "", unknown])


def _corpus(manifest: dict) -> str:
    files = [f"`{name}`" for name, _ in manifest["made_by"]["files"]]
    named = ", ".join(files[:10]) + (f" and {len(files) - 10} more" if len(files) > 10 else "")
    return (
        f"{manifest['documents']:,} documents, {manifest['sentences']:,} sentences, {manifest['tokens']:,} tokens "
        f"({manifest['duplicate_documents']:,} duplicate documents left out), from {named}"
    )


def _training(config: PretrainConfig, state: dict) -> str:
    objective = "masked language modelling" + (" and next-sentence prediction" if config.nsp else "")
    whole_words = " (whole words)" if config.whole_word else ""
    origin = f", from `{_public(config.init_from)}`" if config.init_from else ""
    lines = [
        f"{state['step']:,} updates, {objective}{whole_words}{origin}, in {state['precision']} on {state['processes']} "
        f"{'process' if state['processes'] == 1 else 'processes'}, {timedelta(seconds=round(state['seconds']))} hours:",
        "",
        *(f"- updates {p.first + 1:,} to {p.last:,}: {p.seq} tokens, {p.batch_size} sequences" for p in phases(config)),
        "",
        "| option | value |",
        "|---|---|",
    ]
    defaults = {field.name: field.default for field, _ in fields()}
    for name, value in effective(config.as_dict()).items():
        if name not in NEVER and (name in ALWAYS or value != defaults[name]):
            lines.append(f"| `{flag(name)}` | {_public(value)} |")
    if state["skipped"]:
        lines += ["", f"{state['skipped']:,} updates were skipped, since a loss or gradient was not finite."]
    return "\n".join(lines)


def _results(config: PretrainConfig, state: dict) -> str:
    run = Path(config.out)
    curves = f"\n\n![losses by update]({CURVES})" if (run / CURVES).is_file() else ""
    last = state["validation"]
    if last is None:
        return "Not validated: no documents were held out." + curves
    names = [name for name, value in last.items() if isinstance(value, float)]
    found = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation"}
    rows = list((found | {state["step"]: last}).items())
    shown = min(MOST_ROWS, len(rows))
    picked = [rows[len(rows) - 1 - i * len(rows) // shown] for i in range(shown)][::-1]
    by_source = last.get("sources", {})
    lines = [
        f"On held-out documents, {last['sequences']:,} sequences:",
        "",
        f"| update | {' | '.join(name.replace('_', ' ') for name in names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for step, values in picked:
        cells = ("" if values.get(name) is None else f"{values[name]:.4f}" for name in names)
        lines.append(f"| {step:,} | {' | '.join(cells)} |")
    for name, values in by_source.items():
        if values["mlm_loss"] is not None:
            lines += [""] * (name == next(iter(by_source))) + [f"- `{name}` alone: MLM loss {values['mlm_loss']:.4f}"]
    return "\n".join(lines) + curves


def _public(value):
    """An option's value without the folders of the machine that it was used on."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_public, value))
    folder = isinstance(value, str) and (Path(value).exists() or Path(value.rpartition(":")[0] or value).exists())
    return Path(value).name if folder else value
