"""benchmarks/run.py as a user runs it, on tiny sizes; and the counts and comparisons it rests on."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from bert_fast import flops

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str):
    """A module of benchmarks/, which is a folder of scripts and no package."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path[:] = before


def run(*arguments: str):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--model", "tiny", "--seq", "32", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    ("layers", "hidden", "seq", "predicted", "gflop"),
    [(12, 768, 128, 20, 69.93), (12, 768, 512, 76, 300.9), (24, 1024, 128, 20, 240.6), (24, 1024, 512, 76, 1019.8)],
)
def test_flops_of_published_sizes(layers, hidden, seq, predicted, gflop):
    config = BertConfig(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, vocab_size=30522)
    counted = flops.step_flops(config, [seq], predicted, train=True) / 1e9
    assert counted == pytest.approx(gflop, rel=1e-3)


def test_flops_of_a_last_layer_that_is_read_in_part():
    """Three products of every layer follow its attention: their weights, twice, for every token that is not read."""
    config = BertConfig(num_hidden_layers=3, hidden_size=8, intermediate_size=32, vocab_size=100)
    whole = flops.forward_flops(config, [10, 6], 4)
    assert flops.forward_flops(config, [10, 6], 4, read=16) == whole
    assert whole - flops.forward_flops(config, [10, 6], 4, read=6) == 10 * 2 * (8 * 8 + 8 * 32 + 32 * 8)


def test_wikipedia_quantiles_have_the_histograms_mean():
    from bert_fast.data import wikipedia_lengths

    quantiles = load("workload").wikipedia_quantiles
    counts = wikipedia_lengths()
    mean = (counts * torch.arange(1, 513).numpy()).sum() / counts.sum()
    assert sum(quantiles(64, 512)) / 64 == pytest.approx(mean, rel=0.02)
    assert max(quantiles(64, 128)) <= 128


def test_parity_rows_fail_on_a_wrong_missing_or_undefined_gradient():
    rows_of = load("numerical_parity").rows_of
    truth = {"loss": torch.tensor(7.0).double(), "w": torch.randn(50).double(), "zero": torch.zeros(5).double()}
    reference = {name: t * (1 + 1e-6) for name, t in truth.items()}

    def passed(**changed):
        return {row["what"]: row["passed"] for row in rows_of(truth, reference, {**reference, **changed}, 1e-6)}

    assert all(passed().values())
    assert not passed(w=truth["w"] * 1.001)["w"]
    assert not passed(w=truth["w"] * float("nan"))["w"]
    assert not passed(zero=truth["zero"] + 0.1)["zero"]
    assert not passed(loss=truth["loss"] * 1.01)["loss"]
    without = {name: t for name, t in reference.items() if name != "w"}
    assert [row["passed"] for row in rows_of(truth, reference, without, 1e-6) if row["what"] == "w"] == [False]


def test_paired_ratio_and_quantiles():
    measure = load("measure")
    assert measure.paired_ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == 2.0
    assert measure.quantiles([1.0, 2.0, 3.0])["p50"] == 2.0


def test_a_whole_run(tmp_path):
    results, picture = tmp_path / "r.json", tmp_path / "r.png"
    done = run("--batch", "2", "--rounds", "2", "--peers", "hf-masked-head,hf-flash", "--lengths", "wikipedia",
               "--optimizer", "lamb", "--json", str(results), "--plot", str(picture))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert set(found) >= {"environment", "work", "parity", "throughput", "speedup"}
    assert set(found["work"]) >= {"model", "seq", "batch", "lengths", "real_tokens", "masked", "dtype"}
    assert 16 <= found["work"]["real_tokens"] < 64
    assert found["parity"]["passed"] is True
    assert {"what", "error", "reference_error", "bound"} <= set(found["parity"]["rows"][0])
    assert len(found["parity"]["rows"]) == 47
    assert [row["name"] for row in found["throughput"]][:2] == ["bert_fast", "hf-masked-head"]
    for row in found["throughput"]:
        assert set(row) >= {"step_s", "sequences_per_s", "real_tokens_per_s", "executed_tflops", "share_of_peak", "mfu"}
        assert row["step_s"]["p20"] <= row["step_s"]["p50"] <= row["step_s"]["p80"]
    main = [row for row in found["throughput"] if row["dtype"] == found["work"]["dtype"]]
    assert [row["name"] for row in main] == ["bert_fast", "hf-masked-head"]
    assert all(row["peak_memory_mib"] > 0 for row in main)  # the table beside it, of float32, has none
    assert set(found["speedup"]) == {"hf-masked-head"}
    assert picture.stat().st_size > 10_000
    assert "flash-attn is not installed" in done.stdout or torch.cuda.is_available()


def test_failed_parity_prints_no_speed(tmp_path):
    code = f"""
import sys
sys.argv[0] = {str(BENCHMARKS / "run.py")!r}
sys.path.insert(0, {str(BENCHMARKS)!r})
import bert_fast.reference as reference, bert_fast
right = reference.bias_gelu_fwd
reference.bias_gelu_fwd = lambda x, bias: right(x, bias) * 1.001
from bert_fast import dispatch as seam
seam.set_backend("reference")
import run
arguments = "--model tiny --seq 32 --batch 2 --rounds 1 --dtype float32 --json".split()
sys.exit(run.main([*arguments, {str(tmp_path / "r.json")!r}]))
"""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "parity failed" in done.stderr
    assert "seq/s" not in done.stdout
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["parity"]["passed"] is False
    assert found["throughput"] == []


@pytest.mark.slow
def test_full_lengths_come_with_wikipedias(tmp_path):
    results = tmp_path / "r.json"
    done = run("--batch", "2", "--rounds", "1", "--peers", "hf-eager,hf-compile", "--no-memory", "--json", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(results.read_text())["throughput"]
    assert [(row["name"], row["padding"]) for row in rows if row["lengths"] == "full"][:3] == [
        ("bert_fast", "packed"),
        ("hf-eager", "padded"),
        ("hf-compile", "padded"),
    ]
    assert [row["padding"] for row in rows if row["lengths"] == "wikipedia"] == ["packed", "padded", "longest"]


@pytest.mark.slow
def test_encoding_and_masked_language_modelling_alone():
    quick = ("--batch", "2", "--rounds", "1", "--no-memory")
    encode = run(*quick, "--mode", "encode", "--peers", "hf-sdpa")
    assert encode.returncode == 0, encode.stdout + encode.stderr
    alone = run(*quick, "--no-nsp", "--peers", "hf-eager", "--lengths", "corpus")
    assert alone.returncode == 0, alone.stdout + alone.stderr


def peers_that_run(*arguments: str) -> tuple[list[str], dict[str, str]]:
    module = load("run")
    return module.usable_peers(module.arguments([*arguments, "--device", "cpu"]))


def test_a_missing_peer_is_named_with_how_to_get_it(monkeypatch):
    found = importlib.util.find_spec
    gone = ("onnxruntime", "openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else found(name, *rest))
    peers, missing = peers_that_run("--mode", "encode", "--peers", "hf-sdpa,onnxruntime,openvino")
    assert peers == ["hf-sdpa"]
    assert "onnxruntime " in missing["onnxruntime"]
    assert missing["openvino"].startswith("openvino is not installed")
    for why in missing.values():
        assert "pip install -r benchmarks/requirements-peers.txt" in why
    assert (BENCHMARKS / "requirements-peers.txt").exists()


def test_exported_peers_are_optional_and_encode_only():
    assert not {"onnxruntime", "openvino"} & set(load("run").arguments([]).peers)
    peers, missing = peers_that_run("--peers", "hf-sdpa,openvino")
    assert peers == ["hf-sdpa"]
    assert "--mode encode" in missing["openvino"]


def test_parity_of_encodings_fails_on_wrong_outputs_and_names_a_peer_that_cannot_run(monkeypatch):
    module, workload = load("numerical_parity"), load("workload")
    config = workload.model_config("micro", dropout=0.0)
    batch = workload.random_batch([16, 9], 4, 16, "cpu", nsp=True, vocabulary=config.vocab_size)
    right = module._encoding

    def encode(name, *arguments):
        if name == "broken":
            raise RuntimeError("no such thing here\nmore")
        outputs = right("hf-sdpa" if name == "wrong" else name, *arguments)
        return {what: t * 1.001 for what, t in outputs.items()} if name == "wrong" else outputs

    monkeypatch.setattr(module, "_encoding", encode)
    rows, failed = module.compare_encodings(
        config, batch, "cpu", torch.float32, ["wrong", "broken"], progress=lambda text: None
    )
    assert {(row["variant"], row["what"], row["passed"]) for row in rows} == {
        ("bert_fast", "last_hidden_state", True),
        ("bert_fast", "pooler_output", True),
        ("wrong", "last_hidden_state", False),
        ("wrong", "pooler_output", False),
    }
    assert failed == {"broken": "RuntimeError: no such thing here"}


@pytest.mark.slow
def test_encoding_beside_other_libraries(tmp_path):
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    results = tmp_path / "r.json"
    done = run("--mode", "encode", "--peers", "onnxruntime,openvino", "--lengths", "wikipedia", "--batch", "2",
               "--rounds", "1", "--dtype", "float32", "--json", str(results))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert [(row["variant"], row["what"]) for row in found["parity"]["rows"]] == [
        (name, what)
        for name in ("bert_fast", "onnxruntime", "openvino")
        for what in ("last_hidden_state", "pooler_output")
    ]
    assert found["parity"]["passed"] is True
    assert [row["name"] for row in found["throughput"]] == ["bert_fast", "onnxruntime", "openvino"]
    assert all(row["step_s"]["p50"] > 0 and row["peak_memory_mib"] >= 0 for row in found["throughput"])


def test_a_missing_corpus_ends_with_status_2():
    done = run("--corpus", "no/such/file.txt")
    assert done.returncode == 2
    assert "no corpus file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no text"), (b"text \xff\xfe here", "UTF-8"), (b"\x7fELF\0\0binary", "NUL")]
)
def test_a_corpus_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load("workload").Workload(str(path))


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_the_peers_optimizers_are_ours(optimizer):
    """The update that the reference's variants run gives the weights that bert_fast.optim's gives."""
    variants = load("variants")
    weights = []
    for name in ("bert_fast", "hf-eager"):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.LayerNorm(40))
        update = variants.make_update(variants.Variant(name, model, None), optimizer)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            update()
        weights.append([p.detach() for p in model.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7 + 0.05 * 3e-6)


def test_a_corpus_too_short_for_the_sequence(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("One sentence. Another one.\n\nA second document. It is short.\n")
    with pytest.raises(ValueError, match="no sample of 512 tokens"):
        load("workload").Workload(str(path)).parity_batch(512, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq", "513"], "512 positions"),
        (["--peers", "hf-magic"], "hf-magic"),
        (["--optimizer", "sgd"], "sgd"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        load("run").arguments(arguments)
    assert message in capsys.readouterr().err


def test_the_profile_of_a_step_names_every_operator():
    """A tiny step's time lies where it belongs, and the floors count all FLOPs of the step."""
    profile, workload, variants = load("step_profile"), load("workload"), load("variants")
    config = workload.model_config("tiny", dropout=0.1)
    batch = workload.random_batch([24, 9], 5, 24, "cpu", nsp=True)
    variant = variants.build("bert_fast", config, "cpu", train=True, nsp=True)
    step = variants.make_step(variant, batch, "cpu", torch.float32, train=True, optimizer="none")
    seconds = profile.seconds_by_part(step, 1, "cpu")
    operators = {"embedding_layernorm", "attention", "residual_layernorm", "bias_gelu", "mlm_loss", "matrix products"}
    assert operators <= seconds.keys()
    assert all(value >= 0 for value in seconds.values())

    floor = profile.floors(config, batch, True, True, rate=1.0, copy=float("inf"), element=4)
    attention = 3 * config.num_hidden_layers * 4 * config.hidden_size * (24**2 + 9**2)
    executed = flops.step_flops(config, [24, 9], 5, train=True, read=5 + 2)
    assert floor["matrix products"] + attention == executed
    assert floor["attention"] == pytest.approx(attention * 7 / 6)  # the backward's fifth product
