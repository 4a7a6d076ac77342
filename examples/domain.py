# %% [markdown]
# # An encoder for your domain
#
# From a folder of text to an encoder of its domain: more pieces for the vocabulary, shards, a look ahead, continued
# pre-training, vectors of sentences, a classifier. `examples/domain.ipynb` is this script as a notebook.
#
# Environment variables set what it works on: `CORPUS` (a folder of text; by default the Python language reference,
# which every Python ships), `BASE` (a BERT checkpoint, a folder or a name on the Hub), `OUT`, `STEPS` and `SEQ`. Sixty
# updates show the way, and a domain needs thousands: [the guide](../docs/guide/domain.md) says why.

# %%
import json
import os
import random
from pathlib import Path
from pydoc_data.topics import topics

import bert_fast
from bert_fast import data
from bert_fast.data.tokenizer import find_tokenizer
from bert_fast.run.config import PretrainConfig
from bert_fast.run.dry_run import dry_run
from bert_fast.run.metrics import read_metrics
from bert_fast.run.pretrain import pretrain
from bert_fast.tasks.examples import Example
from bert_fast.tasks.finetuning import finetune
from bert_fast.use.inference import encode_sentences, load_model

BASE = os.environ.get("BASE", "google-bert/bert-base-uncased")
OUT = Path(os.environ.get("OUT", "build/domain"))
CORPUS = Path(os.environ.get("CORPUS", OUT / "corpus"))
STEPS, SEQ = int(os.environ.get("STEPS", "60")), int(os.environ.get("SEQ", "128"))

# %% [markdown]
# ## The text
#
# Text with blank lines between documents, JSON lines, tables, Parquet, a folder of `datasets`: one folder may hold all.

# %%
if "CORPUS" not in os.environ:
    CORPUS.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": topics[name]}) for name in sorted(topics)]
    (CORPUS / "reference.jsonl").write_text("\n".join(lines), encoding="utf-8")
documents = data.read_documents(CORPUS)
print(f"{len(documents):,} documents; one begins: {documents[0][0][:80]!r}")

# %% [markdown]
# ## The vocabulary
#
# The pieces that save most tokens on this text go behind those of the checkpoint, whose ids all stay. What fits in no
# memory is extended by `bert-fast tokenizer CORPUS --extend BASE`.

# %%
path = find_tokenizer(BASE)
assert path is not None, f"{BASE} has no tokenizer"
sentences = [sentence for document in documents for sentence in document]
tokenizer = data.extend_tokenizer(data.load_tokenizer(path), sentences, 300)
manifest = data.prepare(CORPUS, tokenizer, OUT / "data", workers=1)
print(f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens")

# %% [markdown]
# ## A look ahead
#
# What the run will be: parameters, epochs, memory, speed as measured here, and its end. `data` may be several folders
# with weights, as `("domain:3", "general:1")`, where the encoder shall not forget what it knew.

# %%
config = PretrainConfig(
    data=str(OUT / "data"), out=str(OUT / "run"), init_from=BASE, seq=SEQ, batch_size=32, steps=STEPS, lr=5e-5,
    warmup=0.1, validation=0.05, validation_sequences=256, validate_every=max(1, STEPS // 3), log_every=10,
)  # fmt: skip
facts = dry_run(config)

# %% [markdown]
# ## Continued pre-training
#
# Stopped at any point, the same call goes on where it was. New rows begin as the mean of the pieces that they replace.

# %%
if pretrain(config) != 0:
    raise SystemExit("pre-training stopped early: start this again, it goes on from there")
held_out = [line["mlm_loss"] for line in read_metrics(OUT / "run" / "metrics.jsonl") if line["kind"] == "validation"]
print("held-out loss:", *(f"{loss:.3f}" for loss in held_out))

# %% [markdown]
# ## Vectors of sentences

# %%
encoder, tokenizer, _ = load_model(bert_fast.BertModel, OUT / "run")
pair = ["The loop ends when the condition is false.", "A method is looked up on the class of the object."]
vectors = next(encode_sentences(encoder, tokenizer, pair, normalize=True))
print(f"{vectors.shape[1]} numbers a sentence; their cosine is {vectors[0] @ vectors[1]:.2f}")

# %% [markdown]
# ## A task
#
# Sentences about objects or about statements. Take labelled sentences of your own, as
# `bert_fast.tasks.examples.read_examples` reads them, and compare with the checkpoint that the run began with.

# %%
groups = {"objects": ("specialnames", "types", "typesmapping"), "statements": ("compound", "assignment", "import")}
labelled = [
    Example(sentence, None, label)
    for label, names in groups.items()
    for name in names
    for sentence in data.split_sentences(topics[name])
    if len(sentence.split()) > 5
]
random.Random(0).shuffle(labelled)
train, validation = labelled[200:600], labelled[:200]
scores = {}
for name, model in (("adapted", OUT / "run"), ("base", path.parent)):
    scores[name] = finetune(model, train, validation, epochs=2, learning_rate=5e-5, max_length=min(SEQ, 64))["accuracy"]
    print(f"{name}: accuracy {scores[name]:.1%}")
