"""From the hidden states of a sentence's tokens to its vector, as a sentence-transformers folder says."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.text import well_formed

# By the names of sentence-transformers, in the order in which it joins the vectors of several; beside each the flag
# that its older folders have.
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# Of a Transformer module's configuration: what would make other vectors, and what it is where it changes nothing.
PLAIN: dict[str, Any] = {
    "transformer_task": "feature-extraction", "module_output_name": "token_embeddings", "processing_kwargs": {},
    "processor_kwargs": {}, "tokenizer_args": {}, "config_kwargs": {}, "config_args": {}, "query_expansion": None,
    "query_length": None, "document_length": None, "tokenizer_name_or_path": None,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How sentences become vectors.

    ``pooling`` are names of :data:`POOLINGS`, whose vectors are joined; ``prompt`` goes before each sentence, and its
    tokens are pooled with ``include_prompt`` alone; ``prompts`` are others to choose from, by name; ``lowercase``
    comes before the tokenizer's own normalisation. ``max_length`` is in tokens; None: the model's positions.
    """

    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_length: int | None = None
    prompt: str = ""
    include_prompt: bool = True
    lowercase: bool = False
    prompts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"{' and '.join(self.pooling)} over tokens"]
        said += ["scaled to length 1"] if self.normalize else []
        said += [] if self.max_length is None else [f"cut to {self.max_length} tokens"]
        said += ["lower-cased"] if self.lowercase else []
        said += [f"after the prompt {self.prompt!r}"] if self.prompt else []
        said += ["whose own tokens are left out"] if self.prompt and not self.include_prompt else []
        return ", ".join(said)

    def changed(
        self,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> "Recipe":
        """The recipe with what is not None in place of its own; ValueError for names that it does not know."""
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if prompt is not None and prompt_name is not None:
            raise ValueError("prompt and prompt_name were both given: give one")
        if prompt_name is not None:
            if prompt_name not in self.prompts:
                known = ", ".join(self.prompts) or "none"
                raise ValueError(f"the model has no prompt named {prompt_name!r}; it has {known}")
            prompt = self.prompts[prompt_name]
        if prompt is not None:
            prompt, _ = well_formed(prompt)
        given: dict[str, Any] = {"normalize": normalize, "max_length": max_length, "prompt": prompt}
        given |= {"pooling": None if pooling is None else (pooling,)}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})


def transformer_folder(folder: Path) -> Path | None:
    """The folder of the transformer within a sentence-transformers ``folder``; None where it is none."""
    return folder / _modules(folder)[0]["path"] if (folder / "modules.json").is_file() else None


def _modules(folder: Path) -> list[dict]:
    found = _json(folder / "modules.json", kind=list)
    if not found or not all(isinstance(module, dict) and {"path", "type"} <= module.keys() for module in found):
        raise ValueError(f"{folder / 'modules.json'} is damaged: it lists no modules with their path and type")
    return found


def recipe_of(folder: str | Path) -> Recipe | None:
    """What a sentence-transformers folder, or that of its transformer, says; None for any other.

    ValueError where it has modules or settings that make vectors which this engine would not: nothing is left out.
    Source: sentence_transformers.SentenceTransformer and its modules Transformer, Pooling and Normalize.
    """
    folder = Path(folder)
    found = ((root, transformer_folder(root)) for root in (folder, folder.parent))
    roots = [root for root, within in found if within is not None and within.resolve() == folder.resolve()]
    if not roots:
        return None
    root, *_ = roots
    modules = _modules(root)
    kinds = [_kind(module["type"]) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"}:
        raise ValueError(
            f"{root} has the modules {', '.join(kinds)}: encode runs a Transformer, its Pooling and Normalize, no other"
        )
    for module in modules[2:]:
        made = _json(root / module["path"] / "config.json", missing_ok=True)
        if made.get("module_input_name", "sentence_embedding") != "sentence_embedding":
            raise ValueError(f"{root}: its Normalize works on {made['module_input_name']!r}, not on the vectors")
    pooling = _json(root / modules[1]["path"] / "config.json")
    found = _json(root / "config_sentence_transformers.json", missing_ok=True)
    prompts = {name: prompt or "" for name, prompt in found.get("prompts", {}).items()}
    default = found.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ValueError(f"{root}: its default prompt {default!r} is none of its prompts: {', '.join(prompts)}")
    return Recipe(
        pooling=_poolings(root, pooling),
        normalize="Normalize" in kinds,
        prompt=prompts.get(default, ""),
        include_prompt=pooling.get("include_prompt", True),
        prompts=prompts,
        **_transformer_settings(folder),
    )


def _kind(reference: str) -> str:
    """The class of a module, without the path that changes with versions; code of others keeps it."""
    return reference.rpartition(".")[2] if reference.startswith("sentence_transformers.") else reference


def _poolings(root: Path, made: dict) -> tuple[str, ...]:
    modes = made.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, flag in POOLINGS.items() if made.get(flag)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if unknown := [mode for mode in modes if mode not in POOLINGS]:
        raise ValueError(f"{root}: its pooling {unknown[0]!r} is none of {', '.join(POOLINGS)}")
    return modes


def _transformer_settings(folder: Path) -> dict:
    files = sorted(folder.glob("sentence_*_config.json"))  # sentence_bert_config.json; older ones name other models
    made = _json(files[0]) if files else {}
    for name, plain in PLAIN.items():
        if made.get(name) and made[name] != plain:
            raise ValueError(f"{files[0]}: {name} is {made[name]!r}, which encode does not do")
    output = made.get("modality_config", {}).get("text", {}).get("method_output_name", "last_hidden_state")
    if output != "last_hidden_state":
        raise ValueError(f"{files[0]}: it pools {output!r}, encode the last hidden states")
    tokenizer = _json(folder / "tokenizer_config.json", missing_ok=True)
    if tokenizer.get("truncation_side") == "left":
        raise ValueError(f"{folder}/tokenizer_config.json: texts are cut at their beginning, by encode at the end")
    longest = made.get("max_seq_length")
    longest = tokenizer.get("model_max_length") if longest is None else longest
    return {"max_length": longest, "lowercase": made.get("do_lower_case", False)}


def _json(path: Path, *, missing_ok: bool = False, kind: type = dict):
    if missing_ok and not path.is_file():
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path} is damaged: it holds no {kind.__name__}")
    return found


def pooled(hidden: Tensor, ends: Tensor, modes: tuple[str, ...], skip: int = 0) -> Tensor:
    """float32 (sequences, len(modes) * width): the vectors of packed sequences, those of ``modes`` side by side.

    ``hidden`` is (tokens, width), ``ends`` int64 (sequences + 1,): where each begins and ends. The first ``skip``
    tokens of each are left out; where no other is left, the vector of a mean is 0.
    """
    hidden, lengths = hidden.float(), ends.diff()
    last = ends[1:] - 1
    first = torch.minimum(ends[:-1] + skip, last)
    places = torch.arange(len(hidden), device=hidden.device) - ends[:-1].repeat_interleave(lengths)
    inner = hidden
    if skip:
        inner, places, lengths = hidden[places >= skip], places[places >= skip], (lengths - skip).clamp(min=0)
    count = lengths[:, None].clamp(min=1e-9)

    def reduced(values: Tensor, how: str = "sum") -> Tensor:
        return torch.segment_reduce(values, how, lengths=lengths, axis=0)

    def weighted() -> Tensor:
        weights = (places + 1).float()[:, None]
        return reduced(inner * weights) / reduced(weights).clamp(min=1e-9)

    how = {
        "cls": lambda: hidden.index_select(0, first),
        "max": lambda: reduced(inner, "max"),
        "mean": lambda: reduced(inner) / count,
        "mean_sqrt_len_tokens": lambda: reduced(inner) / count.sqrt(),
        "weightedmean": weighted,
        "lasttoken": lambda: hidden.index_select(0, last),
    }
    return torch.cat([how[mode]() for mode in modes], dim=1)


def pooled_padded(hidden: Tensor, mask: Tensor, modes: tuple[str, ...], skip: int = 0) -> Tensor:
    """:func:`pooled` of a batch that is padded on the right, (sequences, tokens, width) and its mask (sequences,
    tokens), by operations that every runtime has."""
    real = mask.bool()
    places = torch.arange(hidden.shape[1], device=hidden.device)
    inner = (real & (places >= skip))[..., None].to(hidden.dtype)
    last = real.sum(1) - 1
    count = inner.sum(1).clamp(min=1e-9)
    weights = inner * (places + 1).to(hidden.dtype)[:, None]

    def at(index: Tensor) -> Tensor:
        return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]

    how = {
        "cls": lambda: at(last.clamp(max=skip)),
        "max": lambda: hidden.masked_fill(inner == 0, torch.finfo(hidden.dtype).min).amax(1),
        "mean": lambda: (hidden * inner).sum(1) / count,
        "mean_sqrt_len_tokens": lambda: (hidden * inner).sum(1) / count.sqrt(),
        "weightedmean": lambda: (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9),
        "lasttoken": lambda: at(last),
    }
    return torch.cat([how[mode]() for mode in modes], dim=1)
