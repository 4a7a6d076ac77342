"""Encoders that are graphs made from transformers' BertModel: ONNX Runtime and OpenVINO, on a CPU, also in int8.

All are optional (benchmarks/requirements-peers.txt) and encode only. They have the model's own weights, run on as
many threads as torch, and are called with the padded batch that transformers' variants get. In int8 each is what its
library recommends for BERT: ONNX Runtime's dynamic quantisation, OpenVINO's post-training quantisation by NNCF.
"""

import contextlib
import importlib.util
import io
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bert_fast.use import onnx_export

Tensor = torch.Tensor

PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "onnxruntime-int8": ("onnx", "onnxruntime"),
            "openvino": ("openvino",), "openvino-int8": ("openvino", "nncf")}  # fmt: skip
CALIBRATION = 32  # random sequences
INPUTS = ("input_ids", "token_type_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "pooler_output")


def why_unavailable(name: str, device: str) -> str | None:
    """Why ``name`` (a key of PACKAGES) cannot run here, or None where it can."""
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return f"{' and '.join(missing)} {verb} not installed: pip install -r benchmarks/requirements-peers.txt"
    return None if device == "cpu" else "it is compared on a CPU"


def computes_in(name: str, dtype: torch.dtype) -> torch.dtype:
    """What ``name`` multiplies in where the benchmark asks for ``dtype``: ONNX Runtime's BERT has no 16 bits."""
    if name.endswith("int8"):
        return torch.int8
    return torch.float32 if name == "onnxruntime" else dtype


def export(name: str, model: nn.Module, dtype: torch.dtype) -> "OnnxRuntime | OpenVino":
    """``model``, a transformers BertModel in float32 on a CPU, as an encoder of ``name`` that computes in ``dtype``.

    Its attention has to be the form that the library fuses: eager for ONNX Runtime, sdpa for OpenVINO. Raises
    RuntimeError where the encoder would not be what is to be compared: not fused, or not in ``dtype``.
    """
    with warnings.catch_warnings():  # tracing warns of every size that Python reads
        warnings.simplefilter("ignore")
        return (OnnxRuntime if name.startswith("onnxruntime") else OpenVino)(model.eval(), dtype)


class _Traced(nn.Module):
    """BertModel as three tensors to two, which is what can be traced."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(input_ids=input_ids, token_type_ids=token_type_ids, attention_mask=attention_mask)
        return outputs.last_hidden_state, outputs.pooler_output


def _example() -> tuple[Tensor, Tensor, Tensor]:
    """A batch to trace with: 2 x 16, the second sequence padded (a mask without zeros could be left out)."""
    ids = torch.arange(5, 37).view(2, 16)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return ids, torch.zeros_like(ids), mask


class OnnxRuntime:
    """Exported to ONNX by tracing, fused by onnxruntime.transformers.optimizer, run by an InferenceSession.

    torch's newer exporter (dynamo=True) gives a graph whose attention the optimiser's patterns do not know.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        config = model.config
        axes = {name: {0: "batch", 1: "sequence"} for name in (*INPUTS, OUTPUTS[0])} | {OUTPUTS[1]: {0: "batch"}}
        with tempfile.TemporaryDirectory() as folder:
            plain, fused = Path(folder) / "plain.onnx", Path(folder) / "fused.onnx"
            torch.onnx.export(_Traced(model).eval(), _example(), str(plain), input_names=INPUTS, output_names=OUTPUTS,
                              dynamic_axes=axes, opset_version=17, dynamo=False)  # fmt: skip
            graph = optimizer.optimize_model(
                str(plain), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size,
                optimization_options=FusionOptions("bert"),
            )  # fmt: skip
            count, layers = graph.get_fused_operator_statistics(), config.num_hidden_layers
            wanted = {"Attention": layers, "BiasGelu": layers, "SkipLayerNormalization": 2 * layers}
            if short := {name: count[name] for name, times in wanted.items() if count[name] != times}:
                raise RuntimeError(f"ONNX Runtime's optimiser did not fuse all of {layers} layers, it fused {short}")
            graph.save_model_to_file(str(fused))
            if dtype == torch.int8:
                whole, fused = fused, fused.with_name("int8.onnx")
                onnx_export.quantize(whole, fused)
            self.session = onnx_export.session(fused)

    def __call__(self, **inputs: Tensor) -> BaseModelOutputWithPooling:
        """The outputs for the tensors INPUTS (B, S) int64."""
        arrays = self.session.run(list(OUTPUTS), {name: inputs[name].numpy() for name in INPUTS})
        return BaseModelOutputWithPooling(*map(torch.from_numpy, arrays))


class OpenVino:
    """Converted by openvino.convert_model and compiled for the shapes that come."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        import openvino

        names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "f32"}
        self.core, self.type = openvino.Core(), getattr(openvino.Type, names[dtype])
        self.settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": names[dtype],
        }
        with torch.no_grad():
            self.graph = openvino.convert_model(_Traced(model).eval(), example_input=_example())
        if dtype == torch.int8:  # the products; what is between them stays in float32
            import nncf

            tokens = min(128, model.config.max_position_embeddings)
            ids = torch.randint(5, model.config.vocab_size, (CALIBRATION, 1, tokens)).numpy()
            inputs = [dict(zip(INPUTS, (x, 0 * x, 0 * x + 1), strict=True)) for x in ids]
            nncf.set_log_level("ERROR")
            with contextlib.redirect_stdout(io.StringIO()):  # its progress
                self.graph = nncf.quantize(
                    self.graph, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION
                )
        self.requests = {}

    def compile_for(self, shape: tuple[int, int]) -> None:
        """Get ready for batches of ``shape`` (B, S); RuntimeError where this device has not the precision asked for."""
        if shape in self.requests:
            return
        graph = self.graph.clone()
        graph.reshape({name: list(shape) for name in INPUTS})
        compiled = self.core.compile_model(graph, "CPU", self.settings)
        runs = compiled.get_property("INFERENCE_PRECISION_HINT")
        if runs != self.type:
            raise RuntimeError(f"OpenVINO computes in {runs.get_type_name()} here, not in {self.type.get_type_name()}")
        self.requests[shape] = compiled.create_infer_request()

    def __call__(self, **inputs: Tensor) -> BaseModelOutputWithPooling:
        """The outputs for the tensors INPUTS (B, S) int64; they are overwritten by the next call of that shape."""
        shape = tuple(inputs[INPUTS[0]].shape)
        self.compile_for(shape)
        outputs = self.requests[shape].infer({name: inputs[name].numpy() for name in INPUTS}, share_outputs=True)
        return BaseModelOutputWithPooling(*(torch.from_numpy(outputs[i]) for i in range(2)))
