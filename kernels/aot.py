"""What dev/compile_report.py compiles ahead of time: every kernel, as its launcher would, at BERT's sizes.

A case has a kernel, a name, the types of the arguments, the constants and the launch configuration, the default one.
``capability`` is 80, 90 or 100; but for attention and the experiments one configuration serves all. Activations are
bf16 and parameters fp32 (autocast), where nothing else is said. Nothing but the report imports this file.
"""

import math
from itertools import product
from typing import Any

import torch
import triton.language as tl

from bert_fast.kernels import (
    attention,
    bias_gelu,
    embedding_layernorm,
    mlm_loss,
    optimizer,
    residual_layernorm,
    rows,
    sum_rows,
)
from bert_fast.kernels.experiments import attention_hopper, feed_forward

HIDDEN, INNER = (768, 1024), (3072, 4096)  # of BERT-base and -large
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def aot_cases(capability: int) -> list[dict]:
    """All cases of a compute capability."""
    everywhere = (_embedding_layernorm, _sum_rows, _residual_layernorm, _bias_gelu, _mlm_loss, _optimizer)
    cases = [case for of in everywhere for case in of()] + _attention(capability)
    if capability == attention_hopper.CAPABILITY:
        cases += _attention_hopper()
    if capability in feed_forward.CAPABILITIES:
        cases += _feed_forward()
    return cases


def _case(kernel, name: str, types: dict, constants: dict, config: dict, **more) -> dict:
    """What ``triton.compile`` needs to build ``kernel`` as the launcher would; ``types`` may have those of others."""
    signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
    pointers = [argument for argument, kind in signature.items() if str(kind).startswith("*")]
    return {
        "kernel": kernel,
        "name": name,
        "signature": signature,
        "constexprs": {**constants, **{key: value for key, value in config.items() if not key.startswith("num_")}},
        "divisible_by_16": pointers + more.pop("divisible", []),
        "dot": False,
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
        **more,
    }


def _types(**kinds: str) -> dict[str, Any]:
    """Argument names, a string of them for each type; a pointer's type is p_ and its element's."""
    return {name: kind.replace("p_", "*") for kind, names in kinds.items() for name in names.split()}


def _sum_partials(operator: str, outputs: int) -> dict:
    types = _types(p_fp32="partial_ptr first_ptr second_ptr third_ptr", i32="programs columns")
    return _case(
        rows._sum_partials_kernel, f"{operator} sum", types, {"OUTPUTS": outputs}, rows._SUM_CONFIG,
        divisible=["columns"],
    )  # fmt: skip


def _embedding_layernorm() -> list[dict]:
    types = _types(
        p_i64="id_ptr position_id_ptr segment_id_ptr row_key_ptr rng_key_ptr",
        p_i32="index_ptr",
        p_bf16="out_ptr grad_out_ptr",
        p_fp32="word_ptr position_ptr segment_ptr weight_ptr bias_ptr mean_ptr rstd_ptr grad_z_ptr partial_ptr",
        i32="tokens words positions segments padding_idx threshold site",
        fp32="scale eps",
    )
    module = embedding_layernorm
    kernels = {"fwd": module._embedding_layernorm_fwd_kernel, "bwd": module._embedding_layernorm_bwd_kernel}
    return [
        _case(
            kernel, f"embedding_layernorm {direction} H={columns} p={p}", types,
            {"COLUMNS": columns, "HAS_DROPOUT": p > 0.0}, module._launch_config(columns, direction),
        )
        for columns, p, (direction, kernel) in product(HIDDEN, (0.0, 0.1), kernels.items())
    ] + [_sum_partials("embedding_layernorm", 2)]  # fmt: skip


def _sum_rows() -> list[dict]:
    """As embedding_layernorm has them: fp32 tables whose gradient is added to, and bf16 ones."""
    cases = []
    for columns, (element, add) in product(HIDDEN, (("fp32", True), ("bf16", False))):
        types = _types(p_fp32="x_ptr piece_ptr", p_i32="index_ptr start_ptr", p_i64="order_ptr", i32="count")
        types["out_ptr"], constants = f"*{element}", {"COLUMNS": columns, "ADD": add}
        name, config = f"{element}{' added' if add else ''} H={columns}", sum_rows.launch_config(columns)
        whole = {**sum_rows._PIECE_CONFIG, "RUN": config["RUN"]}
        cases.append(_case(sum_rows._sum_runs_kernel, f"embedding_layernorm runs {name}", types, constants, config))
        cases.append(_case(sum_rows._sum_pieces_kernel, f"embedding_layernorm pieces {name}", types, constants, whole))
    return cases


# Of tensors that hold the same element in any dtype, and of scalars
_OF_ATTENTION = _types(
    p_i32="cu_seqlens_ptr",
    p_i64="row_key_ptr rng_key_ptr",
    p_fp32="lse_ptr delta_ptr partial_ptr",
    fp32="scale_log2 grad_scale keep_scale keep",
    i32=" ".join(attention._UNSPECIALIZED),
)


def _of_attention(kernel, name: str, element: str, constants: dict, config: dict, tile: tuple[int, int]) -> dict:
    """A case of a kernel over packed projections, which computes scores in tiles of ``tile``."""
    types = {argument: f"*{element}" for argument in kernel.arg_names if argument.endswith("_ptr")} | _OF_ATTENTION
    return _case(kernel, f"attention {name}", types, constants, config, dot=True, score_tile=tile)


def _attention(capability: int) -> list[dict]:
    """Both models have heads of 64, and the number of heads is no constant of the kernels; sequences of 512 and 128
    have one configuration. Heads of 32 and 128 are the other tuned sizes. The backward's are with a bias, as the model
    has them."""
    kernels = {"fwd": attention._attention_fwd_kernel, "dq": attention._attention_bwd_dq_kernel,
               "dkv": attention._attention_bwd_dkv_kernel}  # fmt: skip
    cases = []
    for (name, kernel), size, dtype, p in product(
        kernels.items(), (64, 32, 128), (torch.bfloat16, torch.float16), (0.1, 0.0)
    ):
        config = attention._launch_config(name, capability, size, dtype, 512)
        constants = {"HEAD_DIM": size, "HAS_DROPOUT": p > 0.0} | ({} if name == "fwd" else {"HAS_BIAS": True})
        tile, element = (config["BLOCK_M"], config["BLOCK_N"]), ELEMENTS[dtype]
        cases.append(_of_attention(kernel, f"{name} D={size} {element} p={p}", element, constants, config, tile))
    types = _types(p_fp32="partial_ptr grad_bias_ptr", i32="dq_programs dkv_programs width")
    name, config = "attention bias sum", attention._SUM_CONFIG
    return [*cases, _case(attention._attention_bias_kernel, name, types, {}, config, divisible=["width"])]


def _attention_hopper() -> list[dict]:
    cases = []
    for element, p in product(("bf16", "fp16"), (0.1, 0.0)):
        block, constants = attention_hopper.BLOCK.value, {"HAS_DROPOUT": p > 0.0}
        config = {"num_warps": attention_hopper.FORWARD_WARPS, "num_stages": 1}
        kernel, name = attention_hopper._attention_fwd_asynchronous_kernel, f"asynchronous fwd {element} p={p}"
        cases.append(_of_attention(kernel, name, element, constants, config, (block, block // 2)))
        for longest in (512, 256, 128):
            config = {**attention_hopper._launch_config(longest), "num_stages": 1}
            kernel, name = attention_hopper._attention_bwd_one_pass_kernel, f"one_pass S={longest} {element} p={p}"
            cases.append(_of_attention(kernel, name, element, constants, config, (64, 16 * config["num_warps"])))
    return cases


def _residual_layernorm() -> list[dict]:
    """Hidden states of 16 bits, as `pretrain` has them, and of 32, as transformers has under autocast."""
    module, cases = residual_layernorm, [_sum_partials("residual_layernorm", 3)]
    for columns, dtype, p in product(HIDDEN, (torch.bfloat16, torch.float32), (0.0, 0.1)):
        types = _types(
            p_i64="row_key_ptr rng_key_ptr",
            p_bf16="x_ptr grad_x_ptr",
            p_fp32="bias_ptr weight_ptr ln_bias_ptr mean_ptr rstd_ptr partial_ptr",
            i32="tokens threshold site",
            fp32="scale eps",
        )
        types |= dict.fromkeys(("residual_ptr", "out_ptr", "z_ptr", "grad_out_ptr", "grad_residual_ptr"),
                               f"*{ELEMENTS[dtype]}")  # fmt: skip
        constants = {"COLUMNS": columns, "HAS_BIAS": True, "HAS_DROPOUT": p > 0.0}
        for direction, kernel, own in (
            ("fwd", module._residual_layernorm_fwd_kernel, {"HAS_RESIDUAL": True}),
            ("bwd", module._residual_layernorm_bwd_kernel, {"WRITE_GRAD_X": p > 0.0 or dtype == torch.float32}),
        ):
            wide = " fp32" if dtype == torch.float32 else ""
            name, config = (
                f"residual_layernorm {direction} H={columns}{wide} p={p}",
                module._launch_config(columns, direction, dtype),
            )
            cases.append(_case(kernel, name, types, constants | own, config))
    return cases


def _bias_gelu() -> list[dict]:
    types = _types(p_bf16="x_ptr out_ptr grad_out_ptr grad_x_ptr", p_fp32="bias_ptr partial_ptr", i32="tokens")
    kernels = {"fwd": bias_gelu._bias_gelu_fwd_kernel, "bwd": bias_gelu._bias_gelu_bwd_kernel}
    return [
        _case(
            kernel, f"bias_gelu {direction} F={columns}", types, {"COLUMNS": columns, "HAS_BIAS": True},
            bias_gelu._launch_config(columns, direction),
        )
        for columns, (direction, kernel) in product(INNER, kernels.items())
    ] + [_sum_partials("bias_gelu", 1)]  # fmt: skip


def _feed_forward() -> list[dict]:
    """Products are 16 bits wide, the bias fp32 (autocast); and in fp32."""
    cases = []
    for hidden, dtype in ((768, torch.bfloat16), (1024, torch.bfloat16), (1024, torch.float16), (1024, torch.float32)):
        for direction, kernel in (
            ("fwd", feed_forward._feed_forward_fwd_kernel),
            ("bwd", feed_forward._feed_forward_bwd_kernel),
        ):
            element, config = ELEMENTS[dtype], feed_forward._launch_config(dtype, direction)
            m, n, k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
            del config["PROGRAMS"]
            blocks = {"weight_desc": (n, k) if direction == "fwd" else (k, n)}
            blocks |= dict.fromkeys(("x_desc", "grad_out_desc"), (m, k))
            blocks |= dict.fromkeys(("z_desc", "out_desc", "grad_z_desc"), (m, n // 4))
            types = {name: f"tensordesc<{element}[{a}, {b}]>" for name, (a, b) in blocks.items()}
            types |= _types(p_fp32="bias_ptr partial_ptr", i32="tokens")
            constants = {"HIDDEN": hidden, "COLUMNS": 4 * hidden, "HAS_BIAS": True}
            name = f"feed_forward {direction} H={hidden} {element}"
            cases.append(_case(kernel, name, types, constants, config, dot=True))
    return cases


def _mlm_loss() -> list[dict]:
    """BERT's vocabulary; the matrix products are the library's."""
    vocabulary, cases = 30522, []
    sizes = {"VOCABULARY": vocabulary, "STRIDE": rows.cdiv(vocabulary, mlm_loss._PAD) * mlm_loss._PAD}
    types = _types(
        p_bf16="logits_ptr",
        p_i64="labels_ptr",
        p_fp32="bias_ptr scale_ptr row_loss_ptr partial_ptr",
        i32="count ignore_index",
    )
    for with_grads, first in ((False, True), (True, True), (True, False)):
        name = f"mlm_loss fwd V={vocabulary}" + (" grads" if with_grads else "") + ("" if first else " next chunk")
        constants = {**sizes, "WITH_GRADS": with_grads, "FIRST_CHUNK": first}
        config = mlm_loss._launch_config(vocabulary)
        cases.append(_case(mlm_loss._mlm_loss_kernel, name, types, constants, config))
    types = _types(
        p_bf16="first_ptr first_out_ptr",
        p_fp32="scale_ptr second_ptr third_ptr second_out_ptr third_out_ptr",
        i32="first_size second_size third_size first_blocks second_blocks",
    )
    for in_place, name in ((False, "mlm_loss bwd"), (True, "mlm_loss bwd in place")):
        constants, config = {"IN_PLACE": in_place}, mlm_loss._SCALE_CONFIG
        multiples = ["first_size", "second_size"]  # rows of 768 or 1024; the launcher finds that out
        cases.append(_case(mlm_loss._scale_kernel, name, types, constants, config, divisible=multiples))
    return cases


def _optimizer() -> list[dict]:
    """Every size is an input."""
    module, cases = optimizer, []
    types = _types(
        p_i64="table_ptr size_ptr skipped_ptr start_ptr",
        p_i32="chunk_ptr",
        p_fp32="partial_ptr rate_ptr clip_ptr ratio_ptr step_ptr norm_ptr",
        fp32="beta1 rest1 beta2 rest2 eps max_grad_norm",
        i32="tensors",
    )
    for dtype, (name, kernel, reads_gradients) in product((tl.float32, tl.bfloat16), (
        ("norm", module._optimizer_norm_kernel, False),
        ("adamw", module._optimizer_adamw_kernel, True),
        ("lamb moments", module._optimizer_lamb_moments_kernel, True),
        ("lamb apply", module._optimizer_lamb_apply_kernel, False),
    )):  # fmt: skip
        for but in ("", ", gradients off") if reads_gradients else ("",):
            aligned = tuple(not but or row != module._GRAD.value for row in range(5))
            constants = {"DTYPE": dtype, "ALIGNED": aligned}
            cases.append(_case(kernel, f"optimizer {name} {dtype.name}{but}", types, constants, module._CONFIG))
    types |= {"lrs": ("*fp64", "*fp64"), "decays": ("fp32", "fp32"), "firsts": ("fp32", "fp32")}
    constants = {"LOG_BETA1": math.log(0.9), "LOG_BETA2": math.log(0.999), "COUNTS": True, "CLIPS": True}
    constants |= {"LRS_THERE": (True, True), "DECAYS_THERE": (False, False)}
    kernel, ratio = module._optimizer_rates_kernel, module._optimizer_lamb_ratio_kernel
    cases.append(_case(kernel, "optimizer rates", types, constants, module._RATES_CONFIG))
    return [*cases, _case(ratio, "optimizer lamb ratio", types, {"ADAPT_ALL": False}, module._RATIO_CONFIG)]
