"""The options of run.py."""

import argparse

import torch
import transformers

from benchmarks import contenders, finetuning
from benchmarks.contenders import CONTENDERS, PEERS, Setting
from benchmarks.limits import NAMES
from benchmarks.steps import DROPOUT
from benchmarks.workload import MODELS, TOKENS, Batch, Workload, model_config
from bert_fast.devices import has_matrix_unit
from bert_fast.flops import step_flops

DTYPES = {name: dtype for dtype, name in NAMES.items()}
DEFAULT_PEERS = {"train": ("bert_fast-eager", "hf-eager", "hf-sdpa", "hf-compile", "hf-flash", "hf-masked-head"),
                 "encode": ("hf-eager", "hf-sdpa", "hf-compile", "hf-flash", "onnxruntime", "onnxruntime-int8",
                            "openvino", "openvino-int8"),
                 "finetune": tuple(finetuning.PEERS)}  # fmt: skip
TIMED_SECONDS = 200  # of interleaved rounds at full length that the default batch is chosen for, on a CPU


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", choices=MODELS, default="base", help="BERT's size (default base)")
    made.add_argument("--seq", type=int, default=512, help="tokens of a full sequence (default 512)")
    made.add_argument("--batch", type=int, help="sequences a step (default: on a CPU what fits the time; on a GPU "
                      f"{TOKENS} tokens, halved for all contenders while some lack the memory)")  # fmt: skip
    made.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                      help="autocast dtype; auto: bfloat16 where it is multiplied faster, else float32")  # fmt: skip
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--lengths", choices=("full", "wikipedia", "corpus"), default="full",
                      help="lengths of the sequences; full adds a table at Wikipedia's lengths")  # fmt: skip
    made.add_argument("--mode", choices=("train", "encode", "finetune"), default="train",
                      help="finetune: training and prediction beside transformers' Trainer, in float32 and, where "
                      "it is multiplied faster, in bfloat16")  # fmt: skip
    made.add_argument(
        "--optimizer", choices=("none", "adamw", "lamb"),
        help="clipping and an update in the step: a run's own for ours, PyTorch's fused AdamW and a LAMB of PyTorch's "
        "operations for the peers; with none ours has the gradients' norm still (default: none on a CPU, adamw on a "
        "GPU)",
    )  # fmt: skip
    about = {name: CONTENDERS[name].about for name in PEERS}
    about |= {name: f"{text}, with --mode finetune" for name, (text, *_) in finetuning.PEERS.items()}
    made.add_argument("--peers", help="comma-separated (default: all that can run here but candidates): "
                      + "; ".join(f"{name} ({text})" for name, text in about.items()))  # fmt: skip
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--corpus", help="text to take the batches from (default: Python's language reference)")
    made.add_argument("--no-nsp", action="store_true", help="masked language modelling alone")
    made.add_argument("--no-memory", action="store_true", help="leave out peak memory (on a CPU a child process each)")
    made.add_argument("--kernels", action="store_true", help="each operator alone instead of whole steps")
    made.add_argument("--json", metavar="PATH", help="write the results there")
    made.add_argument("--plot", metavar="PATH", help="write a picture of throughput and memory there")
    made.add_argument("--save", action="store_true",
                      help="write both to benchmarks/results/, in a folder named after this machine")  # fmt: skip
    return made


def arguments(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked and completed: ``setting``, ``peers`` that run and ``missing`` ones with the reason."""
    made = parser(description)
    options = made.parse_args(argv)
    if options.rounds < 1 or options.seq < 8 or (options.batch is not None and options.batch < 1):
        made.error("--rounds and --batch are at least 1, --seq at least 8")
    limit = transformers.BertConfig().max_position_embeddings
    if options.seq > limit:
        made.error(f"--seq {options.seq} is longer than the model's {limit} positions")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch sees no GPU")
    train, options.why_dtype = options.mode == "train", ""
    options.groups = finetuning.groups(options.device, options.dtype)
    if options.dtype == "auto":
        hardware = has_matrix_unit(torch.device(options.device), torch.bfloat16)
        options.dtype = "bfloat16" if hardware else "float32"
        options.why_dtype = "" if hardware else " (bfloat16 is not multiplied faster here; --dtype bfloat16 forces it)"
    if options.mode != "encode" and options.dtype == "float16":
        made.error("--dtype float16: bert-fast trains in bfloat16 or float32; --mode encode has float16")
    options.optimizer = options.optimizer or ("adamw" if options.device == "cuda" and train else "none")
    options.setting = Setting(options.device, DTYPES[options.dtype], train, not options.no_nsp, options.optimizer)
    named = DEFAULT_PEERS[options.mode] if options.peers is None else filter(None, options.peers.split(","))
    if options.mode == "finetune":
        options.peers = list(named)
        if unknown := [peer for peer in options.peers if peer not in finetuning.PEERS]:
            made.error(f"--peers: {unknown[0]!r} is none of {', '.join(finetuning.PEERS)}")
        return options
    try:
        why = {peer: contenders.why_unavailable(peer, options.setting) for peer in named}
    except ValueError as error:
        made.error(f"--peers: {error}")
    options.peers = [peer for peer, reason in why.items() if reason is None]
    options.missing = {peer: reason for peer, reason in why.items() if reason}
    return options


def default_batch(options: argparse.Namespace, config, rate: float) -> int:
    """The largest power of two whose warm-up and rounds fit TIMED_SECONDS at half of the matrix ``rate`` (FLOP/s); on a
    GPU that of TOKENS tokens."""
    if options.device == "cuda":
        return max(1, TOKENS // options.seq)
    full = step_flops(config, [options.seq], options.seq, train=options.setting.train)
    most = TIMED_SECONDS * 0.5 * rate / (full * (options.rounds + 1) * (len(options.peers) + 1))
    batch = 1
    while batch * 2 <= min(most, 64):
        batch *= 2
    return batch


def size(options: argparse.Namespace, work: Workload, limits: dict) -> tuple[dict, Batch]:
    """The "work" of a results file, and the batch of parity. ValueError where the corpus has no such batches."""
    config = model_config(options.model, dropout=DROPOUT)
    known = config.vocab_size
    if work.vocabulary > known:
        raise ValueError(f"BERT-{options.model} has {known} words, the corpus {work.vocabulary}: use another --model")
    sequences = options.batch or default_batch(options, config, 1e12 * limits["matmul_tflops"][options.dtype])
    batch = work.batch(sequences, options.seq, options.lengths, options.device)
    check = work.parity_batch(options.seq, options.device)
    asked = {key: getattr(options, key) for key in ("model", "seq", "lengths", "dtype", "mode", "optimizer", "rounds")}
    return asked | {"batch": sequences, "dropout": DROPOUT, "corpus": work.name, "real_tokens": batch.real_tokens,
                    "masked": batch.predicted, "parity_lengths": check.lengths}, check  # fmt: skip
