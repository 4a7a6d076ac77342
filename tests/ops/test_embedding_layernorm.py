"""embedding_layernorm: dropout(LayerNorm(word + position + segment)), each backend against float64."""

import functools

import pytest
import torch
import torch.nn.functional as F

from bert_fast import dispatch, dropout_mask, ops, reference
from tests.support.operators import BF16, FULL, HALF, assert_same_bits, compare, of_backend
from tests.support.parity import DEVICE, available_backends

EPS = 1e-12
SITE = 0
DTYPES = {  # tables, LayerNorm parameters, output
    "fp32": (FULL, FULL, FULL),
    "bf16": (BF16, BF16, BF16),
    "fp16": (HALF, HALF, HALF),
    "autocast-bf16": (FULL, FULL, BF16),
    "bf16-tables": (BF16, FULL, FULL),
}
BACKENDS = available_backends("embedding_layernorm")
WORDS, POSITIONS, SEGMENTS = 23, 9, 2  # few: Triton's interpreter takes a millisecond a table row


def make_indices(tokens):
    """Ids with hot rows, as [CLS], [SEP] and [MASK] are, and others that no token has."""
    ids = torch.randint(0, WORDS - 3, (tokens,))
    ids[torch.rand(tokens) < 0.5] = 7
    return ids.to(DEVICE), (torch.arange(tokens) % POSITIONS).to(DEVICE), torch.randint(0, 2, (tokens,)).to(DEVICE)


def make_tables(columns, dtypes, segments=SEGMENTS):
    table, parameter, _ = dtypes
    shapes = {"word": (WORDS, columns), "position": (POSITIONS, columns), "segment": (segments, columns)}
    tables = {name: torch.randn(shape).to(table) for name, shape in shapes.items()}
    tables |= {name: torch.randn(columns).to(parameter) for name in ("weight", "bias")}
    return {name: t.to(DEVICE) for name, t in tables.items()}


def make_keys(tokens):
    lengths = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32, device=DEVICE)
    return dropout_mask.row_keys(lengths, tokens), torch.tensor([-0x1234_5678_9ABC_DEF0], device=DEVICE)


def operator(indices, keys, p=0.0, padding_idx=None, out_dtype=None):
    """The operator as a function of its tables."""
    row_key, rng_key = keys
    return functools.partial(
        ops.embedding_layernorm, *indices, eps=EPS, p=p, row_key=row_key, rng_key=rng_key, site=SITE,
        padding_idx=padding_idx, out_dtype=out_dtype,
    )  # fmt: skip


def run(backend, indices, tables, grad_out, keys, p=0.0):
    return of_backend("embedding_layernorm", backend, operator(indices, keys, p), tables, grad_out)


def check(backend, tokens, columns, dtypes, p, padding_idx=None, indices=None, segments_of_table=SEGMENTS):
    indices = make_indices(tokens) if indices is None else indices
    tables, keys, out_dtype = make_tables(columns, dtypes, segments_of_table), make_keys(tokens), dtypes[2]
    grad_out = torch.randn(tokens, columns, device=DEVICE).to(out_dtype)
    ids, positions, segments = indices

    def exact(word, **others):
        if padding_idx is not None:  # nn.Embedding's rule, which is about the gradient alone
            word = torch.cat(
                [word[:padding_idx], word[padding_idx : padding_idx + 1].detach(), word[padding_idx + 1 :]]
            )
        arguments = (*indices, word, *others.values(), *keys, EPS, p, SITE, -1, torch.float64)
        return reference.embedding_layernorm_fwd(*arguments)[0]

    def composed(word, position, segment, weight, bias):
        z = F.embedding(ids, word, padding_idx) + F.embedding(segments, segment) + F.embedding(positions, position)
        y = F.layer_norm(z, z.shape[1:], weight.to(z.dtype), bias.to(z.dtype), EPS)
        if p:
            y = y * dropout_mask.hidden_keep_mask(keys[1], keys[0], columns, p, SITE) * dropout_mask.dropout_scale(p)
        return y.to(out_dtype)

    ours = operator(indices, keys, p, padding_idx, out_dtype)
    return compare("embedding_layernorm", backend, ours, composed, exact, tables, grad_out)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, dtypes, p):
    check(backend, 17, 96, DTYPES[dtypes], p)


@pytest.mark.parametrize(("tokens", "columns"), [(0, 32), (1, 32), (17, 1), (49, 7), (18, 300), (5, 1024)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, tokens, columns):
    check(backend, tokens, columns, DTYPES["fp32"], 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "autocast-bf16"])
@pytest.mark.parametrize(
    ("tokens", "columns"), [(65, 24), (600, 64), (33, 300), (5, 768), (70, 1024), (3, 4096), (2, 8192)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_shapes(backend, tokens, columns, dtypes):
    check(backend, tokens, columns, DTYPES[dtypes], 0.1)


@pytest.mark.parametrize("tokens", [15, 32, 49])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_takes_every_token(backend, tokens):
    """The hottest possible rows: sums in less than a run, in whole runs alone, and with a rest."""
    same = [torch.full((tokens,), index, device=DEVICE) for index in (WORDS - 1, 3, 0)]
    result = check(backend, tokens, 32, DTYPES["fp32"], 0.1, indices=same)
    for name, row in (("d word", WORDS - 1), ("d position", 3), ("d segment", 0)):
        others = torch.ones(result[name].shape[0], dtype=torch.bool, device=DEVICE)
        others[row] = False
        assert (result[name][others] == 0).all(), name


@pytest.mark.parametrize("counts", [(15, 1, 16, 17), (3, 5, 50, 5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_meet_rows_at_every_offset(backend, counts):
    ids = torch.repeat_interleave(torch.tensor([0, 1, 12, WORDS - 1]), torch.tensor(counts))
    tokens = ids.numel()
    ids = ids[torch.randperm(tokens)].to(DEVICE)
    positions, segments = torch.full_like(ids, POSITIONS - 1), ids % 2
    check(backend, tokens, 16, DTYPES["fp32"], 0.0, indices=(ids, positions, segments))


@pytest.mark.parametrize("segments", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_segments(backend, segments):
    """Some of each at every position, and one that no token has."""
    ids, positions, _ = make_indices(50)
    found = torch.randint(0, max(1, segments - 1), (50,)).to(DEVICE)
    result = check(backend, 50, 24, DTYPES["fp32"], 0.1, None, (ids, positions % 3, found), segments)
    assert segments == 1 or (result["d segment"][-1] == 0).all()


@pytest.mark.parametrize("padding_idx", [0, 7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_idx_gets_no_gradient(backend, padding_idx):
    ids, positions, segments = make_indices(40)
    ids[::5] = padding_idx
    result = check(backend, 40, 32, DTYPES["fp32"], 0.1, padding_idx, (ids, positions, segments))
    assert (result["d word"][padding_idx] == 0).all()
    assert (result["d position"] != 0).any()


@pytest.mark.parametrize(
    ("dtypes", "tokens", "padding_idx"), [("fp32", 0, -1), ("fp32", 50, -1), ("fp32", 50, 7), ("bf16", 50, -1)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_added_in_place_with_the_bits_of_a_sum(backend, dtypes, padding_idx, tokens):
    """embedding_layernorm_bwd_add is embedding_layernorm_bwd, and one addition of what that gives."""
    table, _, out_dtype = DTYPES[dtypes]
    indices, tables, keys = make_indices(tokens), list(make_tables(24, DTYPES[dtypes]).values())[:4], make_keys(tokens)
    grad_out = torch.randn(tokens, 24, device=DEVICE).to(out_dtype)
    statistics = (torch.rand(tokens, device=DEVICE), torch.rand(tokens, device=DEVICE))
    held = torch.randn(WORDS, 24, device=DEVICE).to(table)
    arguments = (grad_out, *indices, *tables, *statistics, *keys, 0.1, SITE, padding_idx)
    with dispatch.use_backend(embedding_layernorm=backend):
        word, *expected = torch.ops.bert_fast.embedding_layernorm_bwd(*arguments)
        ours = held.clone()
        others = torch.ops.bert_fast.embedding_layernorm_bwd_add(*arguments, ours)
    assert torch.equal(ours, held + word)
    assert torch.equal(ours[WORDS - 3 :], held[WORDS - 3 :])  # of words that no token is
    assert torch.equal(ours[7], held[7]) == (padding_idx == 7 or tokens == 0)
    assert all(torch.equal(a, b) for a, b in zip(others, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_and_large_means(backend):
    indices, keys = make_indices(20), make_keys(20)
    tables = make_tables(64, DTYPES["fp32"])
    for name in ("word", "position", "segment"):
        tables[name] = torch.full_like(tables[name], 0.25)
    out = run(backend, indices, tables, torch.randn(20, 64, device=DEVICE), keys)["out"]
    torch.testing.assert_close(out, tables["bias"].expand(20, 64), rtol=0, atol=0)

    tables = make_tables(64, DTYPES["fp32"])
    tables["word"] += 1e4
    out = run(backend, indices, tables, torch.randn(20, 64, device=DEVICE), keys)["out"]
    z = tables["word"][indices[0]] + tables["segment"][indices[2]] + tables["position"][indices[1]]
    exact = F.layer_norm(z.double(), (64,), tables["weight"].double(), tables["bias"].double(), EPS)
    # z is the rounded sum, so the statistics alone are on trial: the mean is right to one unit of 1e4 in fp32, which
    # shifts the row by 1e-3 of its deviation; E[z^2] - E[z]^2 would be off by more than the variance.
    assert (out - exact).abs().max() < 3e-3


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("columns", [32, 100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_is_the_function(backend, columns, p):
    tables, keys = make_tables(columns, DTYPES["fp32"]), make_keys(21)
    tables["weight"], tables["bias"] = torch.zeros_like(tables["weight"]), torch.ones_like(tables["bias"])
    out = run(backend, make_indices(21), tables, torch.ones(21, columns, device=DEVICE), keys, p)["out"]
    keep = dropout_mask.hidden_keep_mask(keys[1], keys[0], columns, p, SITE)
    assert torch.equal(out, keep * torch.tensor(dropout_mask.dropout_scale(p), device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend):
    indices, tables, keys = make_indices(40), make_tables(64, DTYPES["fp32"]), make_keys(40)
    grad_out = torch.randn(40, 64, device=DEVICE)
    first, second = (run(backend, indices, tables, grad_out, keys, 0.1) for _ in range(2))
    assert_same_bits(first, second)


def both_ways(indices, tables, grad_out, keys, p):
    """Output and gradients of the kernels, called past the checks of ops: on a GPU nothing is checked before."""
    from bert_fast.kernels import embedding_layernorm as kernel

    out, mean, rstd = kernel.embedding_layernorm_fwd(*indices, *tables.values(), *keys, EPS, p, 0, -1, FULL)
    tensors = list(tables.values())[:4]
    return out, kernel.embedding_layernorm_bwd(grad_out, *indices, *tensors, mean, rstd, *keys, p, 0, -1)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
@pytest.mark.parametrize(
    ("which", "value", "p", "valid"),
    [(0, WORDS, 0.0, 19), (0, -1, 0.5, 16), (1, 2**40, 0.5, 15), (2, SEGMENTS, 0.0, 17), (2, -(2**33), 0.5, 0)],
)
def test_index_out_of_range_is_nan_and_goes_nowhere(which, value, p, valid):
    """One token; and so many that the others are just a run, one less, one more, or none."""
    indices, tables, keys = list(make_indices(20)), make_tables(32, DTYPES["fp32"]), make_keys(20)
    grad_out = torch.randn(20, 32, device=DEVICE)
    bad = torch.randperm(20, device=DEVICE)[valid:]
    broken = indices[which].clone()
    broken[bad] = value
    out, grads = both_ways([*indices[:which], broken, *indices[which + 1 :]], tables, grad_out, keys, p)
    assert out[bad].isnan().all()
    others = broken != value
    fewer = [i[others] for i in indices]
    good_out, good_grads = both_ways(fewer, tables, grad_out[others], (keys[0][others], keys[1]), p)
    assert torch.equal(out[others], good_out)
    for ours, expected in zip(grads, good_grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on CPU tensors")
@pytest.mark.parametrize(
    ("which", "value", "message"),
    [
        (0, WORDS, rf"ids\[3\] is {WORDS}, allowed is 0 .. {WORDS - 1} \(1 of 9 are out of range\)"),
        (0, -1, r"ids\[3\] is -1"),
        (1, POSITIONS, rf"positions\[3\] is {POSITIONS}"),
        (2, 2, r"segments\[3\] is 2, allowed is 0 .. 1"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_index_out_of_range_raises_on_a_cpu(backend, which, value, message):
    indices, tables = make_indices(9), make_tables(32, DTYPES["fp32"])
    indices[which][3] = value
    with pytest.raises(IndexError, match=message):
        run(backend, indices, tables, torch.randn(9, 32), make_keys(9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous(backend):
    tables = make_tables(64, DTYPES["fp32"])
    indices = [torch.stack([i, i], dim=1)[:, 0] for i in make_indices(9)]
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in tables.items()}
    grad_out = torch.randn(64, 9, device=DEVICE).T
    first = run(backend, indices, strided, grad_out, make_keys(9), 0.1)
    second = run(backend, [i.contiguous() for i in indices], tables, grad_out.contiguous(), make_keys(9), 0.1)
    assert_same_bits(first, second)


@pytest.mark.parametrize(
    ("backend", "p"), [(b, 0.1) for b in BACKENDS] + [pytest.param(b, 0.0, marks=pytest.mark.slow) for b in BACKENDS]
)
def test_opcheck(backend, p):
    indices, keys = [i % 2 for i in make_indices(5)], make_keys(5)
    tables = {name: t[:2].clone() if t.dim() == 2 else t for name, t in make_tables(16, DTYPES["fp32"]).items()}
    leaves = [t.requires_grad_() for t in tables.values()]
    statistics = (torch.rand(5, device=DEVICE), torch.rand(5, device=DEVICE))
    with dispatch.use_backend(embedding_layernorm=backend):
        torch.library.opcheck(
            torch.ops.bert_fast.embedding_layernorm_fwd, (*indices, *leaves, *keys, EPS, p, SITE, 0, FULL)
        )
        detached = [t.detach() for t in leaves[:4]]
        arguments = (torch.randn(5, 16, device=DEVICE), *indices, *detached, *statistics, *keys, p, SITE, 0)
        torch.library.opcheck(torch.ops.bert_fast.embedding_layernorm_bwd, arguments)
        torch.library.opcheck(
            torch.ops.bert_fast.embedding_layernorm_bwd_add, (*arguments, torch.randn_like(detached[0]))
        )


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_triton_names_what_it_lacks():
    tables = make_tables(32, (torch.float64,) * 3)
    with pytest.raises(TypeError, match=r"word has dtype torch.float64.*reference"):
        run("triton", make_indices(3), tables, torch.randn(3, 32, device=DEVICE), make_keys(3))
