"""BertPreTrainedModel and BertModel: what comes in becomes packed rows, what goes out is what transformers gives."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Self

import torch
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from bert_fast import ops, packing
from bert_fast.model import fusable, idcheck, inputs, layers, swap
from bert_fast.model.inputs import ModelKwargs
from bert_fast.packing import Layout
from bert_fast.tuning import store

Tensor = torch.Tensor
RECOMPUTED = ("nothing", "gelu", "layers")
logger = logging.get_logger(__name__)


@dataclasses.dataclass
class Rows:
    """A head's request to ``BertModel.forward`` for packed rows, and the answer.

    ``read`` (B, S) bool: positions whose outputs the head reads though no mask may attend them (labels).
    ``places`` (M,) int64: the only places in the flattened dense batch (rows, of packed input) whose outputs it reads;
    the last layer is then computed for them and the pooler's tokens alone. None: every output is read.
    Filled by the forward: ``layout``, ``pooled`` (B, H), and ``hidden``, (M, H) for ``places``, else (T, H); the dense
    last_hidden_state is then not made.
    """

    read: Tensor | None = None
    places: Tensor | None = None
    layout: Layout | None = None
    hidden: Tensor | None = None
    pooled: Tensor | None = None

    def fill(self, layout: Layout, dense: Tensor, pooled: Tensor | None) -> None:
        """The answer from outputs, dense (B, S, H) and pooled (B, H), in which each place of ``layout`` is a row."""
        self.layout, self.pooled = dataclasses.replace(layout, indices=None, shown=None), pooled
        self.hidden = dense.flatten(0, 1) if self.places is None else dense.flatten(0, 1).index_select(0, self.places)

    def dense(self) -> Tensor:
        """``hidden`` of all places as (B, S, H)."""
        return packing.unpack(self.layout, self.hidden)


class _Unpacked(threading.local):
    """How many forwards of ``nothing_packed`` this thread is in. torch.compile cannot trace a context variable."""

    forwards = 0


_unpacked = _Unpacked()


@contextlib.contextmanager
def nothing_packed() -> Iterator[None]:
    """Around the call of an encoder that is not this engine's alone, whose padding may be read: a BertModel in there
    computes padding as transformers does."""
    _unpacked.forwards += 1
    try:
        yield
    finally:
        _unpacked.forwards -= 1


# what this engine's forward takes and transformers' modules do not know
_OURS = {"rows", "hidden_dtype", "sample_ids", "cls_positions", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
         "max_length_k"}  # fmt: skip


class BertPreTrainedModel(hf.BertPreTrainedModel):
    """transformers' BertPreTrainedModel whose modules, once built, run on this engine."""

    def __init__(self, config, *args, **kwargs):
        swap.refuse_unsupported(config)
        requested = self._check_and_adjust_attn_implementation(config._attn_implementation)
        # transformers' own constructors run first and would refuse implementations that are not installed
        config._attn_implementation_internal = "eager"
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config._attn_implementation_internal = requested
        swap.swap_classes(self)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs) -> str:
        known = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
        # a name with a slash is a kernel's on the Hub, one with | is another form of a known name
        if (
            attn_implementation is not None
            and attn_implementation not in known
            and not set("/|") & set(attn_implementation)
        ):
            raise ValueError(
                f'Specified `attn_implementation="{attn_implementation}"` is not supported. bert_fast has an attention '
                f"of its own and accepts the names that transformers knows, though they change nothing: {known}"
            )
        if attn_implementation not in (None, "eager", "sdpa"):
            logger.warning_once(
                f"bert_fast has an attention of its own; attn_implementation={attn_implementation!r} is accepted "
                "and changes nothing."
            )
        return attn_implementation or "sdpa"

    def recompute(self, what: str = "nothing") -> None:
        """What the backward computes again in place of keeping it since the forward, to the same bits: "nothing",
        "gelu" (GELU's output, a quarter of what a layer keeps) or "layers" (all but each layer's input: transformers'
        gradient checkpointing). ValueError for anything else."""
        if what not in RECOMPUTED:
            raise ValueError(f"bert_fast: recompute takes one of {', '.join(RECOMPUTED)}, got {what!r}")
        for module in self.modules():
            if isinstance(module, layers.BertLayer):
                module.recompute_gelu = what == "gelu"
        # transformers calls it activation checkpointing in later versions, which warn of the other name
        kind = "activation" if hasattr(self, "activation_checkpointing_enable") else "gradient"
        if what == "layers":
            # dropout's masks are functions of their keys: no generator's state has to be put back but for others' code
            drawn = not all(fusable.keyed(m) for m in self.modules() if isinstance(m, hf.BertLayer))
            getattr(self, f"{kind}_checkpointing_enable")({"use_reentrant": False, "preserve_rng_state": drawn})
        elif any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            getattr(self, f"{kind}_checkpointing_disable")()

    def enable_input_require_grads(self) -> None:
        """As transformers', which does it for gradient checkpointing and adapters; its hook is one that the embeddings
        know, and so stay fused where it changes nothing."""
        super().enable_input_require_grads()
        hooks = self.get_input_embeddings()._forward_hooks
        hooks.update((handle.id, fusable.requires_grad) for handle in self._require_grads_hooks if handle.id in hooks)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Self:
        """As transformers', for the Auto classes too (bert_fast.register)."""
        swap.refuse_other_code(cls, kwargs.get("config"), kwargs.get("trust_remote_code"))
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs) -> Self:
        swap.refuse_other_code(cls, config, None)
        return super()._from_config(config, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_correct_attn_implementation(self, requested_attention, is_init_check: bool = False) -> str:
        return self._check_and_adjust_attn_implementation(requested_attention)


class BertModel(BertPreTrainedModel, hf.BertModel):
    """The encoder: same constructor, arguments, outputs and checkpoint keys as ``transformers.BertModel``."""

    _showed_padding = False
    _settled = False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        **kwargs: Unpack[ModelKwargs],
    ) -> tuple[Tensor, ...] | BaseModelOutputWithPoolingAndCrossAttentions:
        """As ``transformers.BertModel.forward``, without a decoder's arguments.

        input_ids, token_type_ids, position_ids (B, S) int32 or int64, or inputs_embeds (B, S, H); attention_mask
        (B, S), attended where not 0, or (B, heads or 1, S or 1, S), bool or added to the scores. Positions that no
        mask attends are 0 in the outputs. Packed input: (1, T) with ``cu_seq_lens_q`` (B+1,) int32 and
        ``max_length_q``; every sequence is then computed alone, and pooled outputs are (B, H), of the first token
        of each or of ``cls_positions`` (B,). ``sample_ids`` (B,) name the samples of the batch for the dropout
        masks. Position ids alone, of a batch of 1 without a mask, tell such sequences too, where they go up by one and
        begin again at 0 or where the first does (transformers' DataCollatorWithFlattening); with a mask of ones they
        are positions of one sequence.
        ``hidden_dtype`` is the dtype of the hidden states; by default the parameters', under autocast too, as
        transformers has it, where bfloat16 halves what layers pass on and keep. Raises ValueError, TypeError or
        IndexError for input that does not fit.
        """
        inputs.refuse_decoders(
            encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
        )  # fmt: skip
        source = inputs.source_of(self.config, input_ids, inputs_embeds)
        if source.is_cuda and not (self._settled or torch.compiler.is_compiling()):
            self._settled = True
            store.settle_kept(self.config, source.device)
        if source.shape[1] == 0 and self.pooler is not None:
            raise ValueError("the batch has sequences of length 0: the pooler reads the first token of each")
        hidden_dtype, rows = kwargs.get("hidden_dtype"), kwargs.get("rows")
        inputs.check_hidden_dtype(hidden_dtype, self.dtype, source)
        wants = {
            key: kwargs[key] if kwargs.get(key) is not None else getattr(self.config, key, False)
            for key in ("output_hidden_states", "output_attentions")
        }
        pools_all = self._pools_all()
        layout = inputs.layout_of(
            source, attention_mask, position_ids, self.config.num_attention_heads,
            self._read(attention_mask, source, rows, pools_all), self.pooler is not None, **kwargs,
        )  # fmt: skip
        if wants["output_attentions"]:
            inputs.with_weights(layout)
        batch, length = source.shape[:2]
        positions = inputs.positions_of(layout, position_ids, batch, length, self._table_of_positions())
        segments = inputs.segments_of(layout, token_type_ids, batch, length)
        if not layers.all_ours(self.embeddings, self.encoder):
            given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask,
                     "token_type_ids": token_type_ids, "position_ids": position_ids}  # fmt: skip
            if layout.packed:
                given |= {"token_type_ids": segments[None], "position_ids": positions[None]}
            return self._as_transformers(given, layout, {**kwargs, **wants})

        if self._drops():
            layout.rng_key = ops.draw_dropout_key(layout.row_key)
        ids, embeds = self._looked_up(input_ids, inputs_embeds, layout)
        named = input_ids if embeds is None else None
        with idcheck.naming(lambda: inputs.misplaced(self.config, layout, named, token_type_ids, position_ids)):
            x = self.embeddings(ids, positions, segments, embeds, layout, hidden_dtype)
        hidden_states: list[Tensor] | None = [] if wants["output_hidden_states"] is not False else None
        attentions: list[Tensor] | None = [] if wants["output_attentions"] else None
        x = layers.shown(x, layout, hidden_states)

        places = None if rows is None or rows.places is None else packing.rows_of(layout, rows.places)
        only = None
        if places is not None and hidden_states is None and attentions is None and not pools_all:
            only = self._rows_read(places, layout)
        x = self.encoder(x, layout, hidden_states, attentions, only)
        if only is not None:
            # not two slices: the gradient of each would be one of all rows, filled up with zeros
            hidden, first = x.split((places.shape[0], x.shape[0] - places.shape[0]))
        else:
            hidden, first = x if places is None else x.index_select(0, places), None
        pooled = self._pooled(x, first, layout, pools_all)
        if rows is not None:
            rows.layout, rows.hidden, rows.pooled = layout, hidden, pooled
        dense = hidden_states[-1] if hidden_states else (packing.unpack(layout, x) if rows is None else None)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=dense,
            pooler_output=pooled,
            hidden_states=_selected(hidden_states, wants["output_hidden_states"]),
            attentions=None if attentions is None else tuple(attentions),
            cross_attentions=None if attentions is None else (),  # as transformers has it
        )

    def _looked_up(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, layout: Layout
    ) -> tuple[Tensor | None, Tensor | None]:
        """(ids (T,) int64, None), or (None, rows (T, H)) where the caller embedded them or the table is called here."""
        word = self.embeddings.word_embeddings
        if input_ids is not None and fusable.plain_table(word):
            return packing.pack(layout, input_ids).long(), None
        if input_ids is not None:
            with idcheck.naming(lambda: idcheck.misplaced(self.config, None, input_ids)):
                inputs_embeds = word(input_ids)
        if layout.mask is not None and layout.indices is None:
            # keys that no query attends have weights of 0, which NaN and infinity would outlive
            inputs_embeds = inputs_embeds.where(layout.mask[..., None], inputs_embeds.nan_to_num(0.0, 0.0, 0.0))
        return None, packing.pack(layout, inputs_embeds)

    def _pooled(self, x: Tensor, first: Tensor | None, layout: Layout, pools_all: bool) -> Tensor | None:
        """The pooler's output (B, H) of rows x (T, H); ``first`` (B, H) where the last layer made its rows alone."""
        if self.pooler is None:
            return None
        if pools_all:
            states = packing.by_sequence(layout, x) if layout.packed else packing.unpack(layout, x)
        else:
            states = (self._first(x, layout) if first is None else first)[:, None]
        pooled = self.pooler(states)
        # one output, where each sequence would have its own
        return pooled if layout.several is None else pooled.masked_fill(layout.several, torch.nan)

    def _as_transformers(self, given: dict, layout: Layout, kwargs: dict):
        """The outputs of transformers' own forward, in which parts that do not take rows are called as they expect.
        Packed input is a padded batch there, a sequence a row."""
        logger.warning_once(
            "bert_fast: a part of this BERT has a forward of its own, or all modules are hooked: its encoder runs as "
            "transformers' does, without packing and fused operators"
        )
        weights, rows = bool(kwargs["output_attentions"]), kwargs.get("rows")
        able = ("eager",) if weights else ("eager", "sdpa")
        if self.config._attn_implementation not in able:  # not set for a while: checkpointed layers run again later
            raise ValueError(
                f"a part of this BERT has a forward of its own, so that attention is transformers', and "
                f"attn_implementation={self.config._attn_implementation!r} cannot be used"
                f"{' for output_attentions' if weights else ''}: call model.set_attn_implementation('eager')"
            )
        if layout.packed:
            if weights:
                raise ValueError("packed input has no output_attentions where a part of the model has its own forward")
            places, real = packing.sequences(layout)
            given = {key: None if value is None else value[0][places] for key, value in given.items()}
            # a sequence without tokens attends its first place: attention to nothing at all may be NaN
            given["attention_mask"] = real | (torch.arange(real.shape[1], device=real.device) == 0)
        elif layout.bias is not None and (given["attention_mask"] is None or given["attention_mask"].dim() == 4):
            given["attention_mask"] = layout.bias.to(self.dtype).clamp(min=torch.finfo(self.dtype).min)
        theirs = {key: value for key, value in kwargs.items() if key not in _OURS}
        outputs = hf.BertModel.forward(self, **given, **theirs, return_dict=True)
        if "_output_capturing_hooks_installed" in self.__dict__:
            for module in self.modules():
                swap.release(module)
        if layout.packed:

            def packed(padded: Tensor | None) -> Tensor | None:
                if padded is None:
                    return None
                flat = padded.new_zeros(layout.length, padded.shape[-1])
                return flat.index_copy(0, places[real], padded[real])[None]

            outputs.last_hidden_state = packed(outputs.last_hidden_state)
            if outputs.hidden_states is not None:
                outputs.hidden_states = tuple(map(packed, outputs.hidden_states))
        if rows is not None:
            rows.fill(layout, outputs.last_hidden_state, outputs.pooler_output)
        return outputs

    def _read(self, mask: Tensor | None, source: Tensor, rows: Rows | None, pools_all: bool) -> Tensor | None:
        """Bool (B, S): places whose outputs are read though a ``mask`` (B, S) may leave them out; None: none."""
        if mask is None or mask.dim() != 2:
            return None
        if self._shows_padding() or pools_all:
            return torch.ones_like(mask, dtype=torch.bool, device=source.device)  # code of one's own may read all of it
        return None if rows is None else rows.read

    def _table_of_positions(self) -> int:
        """How many positions the embeddings have; one's own may have no table."""
        table = getattr(self.embeddings, "position_embeddings", None)
        return getattr(table, "num_embeddings", self.config.max_position_embeddings)

    def _shows_padding(self) -> bool:
        """This forward is within ``nothing_packed``, or a checkpoint runs one again, in a backward, that was."""
        shows = _unpacked.forwards > 0
        if torch.compiler.is_compiling():
            return shows
        if torch._C._current_graph_task_id() != -1:
            return shows or self._showed_padding
        self.__dict__["_showed_padding"] = shows
        return shows

    def _pools_all(self) -> bool:
        """The pooler may read every token: it is hooked, or not transformers', which reads each sequence's first."""
        return self.pooler is not None and not fusable.untouched(self.pooler, hf.BertPooler)

    def _drops(self) -> bool:
        if fusable.dropout_p(self.embeddings.dropout) > 0:
            return True
        for layer in self.encoder.layer:
            parts, attention = layer._modules, layer._modules["attention"]._modules
            weights = attention["self"]
            if (
                (weights.training and getattr(weights.dropout, "p", 0.0) > 0)
                or fusable.dropout_p(attention["output"].dropout) > 0
                or fusable.dropout_p(parts["output"].dropout) > 0
            ):
                return True
        return False

    def _rows_read(self, asked: Tensor, layout: Layout) -> Tensor | None:
        """The rows that a head and the pooler read, in this order; None where the last layer has to make all: it is
        hooked, so a hook may look at it, or nothing would be saved."""
        if not (len(self.encoder.layer) and fusable.unhooked(self.encoder.layer[-1])):
            return None
        rows = layout.row_key.shape[0]
        if self.pooler is not None:
            first = layout.first
            if first is None:
                first = torch.arange(layout.batch, device=asked.device) * layout.length
            asked = torch.cat([asked, first])
        return asked if asked.shape[0] < rows else None

    def _first(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.first is not None:
            return x.index_select(0, layout.first)
        return x.view(layout.batch, layout.length, x.shape[1])[:, 0]


def _selected(hidden_states: list | None, which) -> tuple | None:
    """All hidden states for True; those of the given indices, the others None, for an int or a list of them."""
    if hidden_states is None:
        return None
    if isinstance(which, bool):
        return tuple(hidden_states)
    count = len(hidden_states)
    chosen = {i % count for i in ([which] if isinstance(which, int) else which) if -count <= i < count}
    return tuple(h if i in chosen else None for i, h in enumerate(hidden_states))
