"""FLOPs of BERT, counted as multiply and add apart; only matrix products count.

Two counts. The *full formula* is what model-FLOPs utilisation (MFU) is taken with: every position of a padded
batch, attention over the padded length, the MLM head at the predicted positions. The *executed* count is what a
packed run with a masked-only head really computes: real tokens, attention within each sequence.
Training counts three times the forward (one product forward, two backward; nothing recomputed counts).
Source: the forward formula per sequence, 24 L h^2 s + 4 L h s^2 + P (2 h^2 + 2 h V) + 2 h^2 + 4 h.
"""

from collections.abc import Iterable


def forward_flops(config, lengths: Iterable[int], predicted: int, read: int | None = None) -> int:
    """Forward FLOPs of sequences of ``lengths`` tokens with ``predicted`` masked positions in all (0: no head).

    ``config`` is a BertConfig. The pooler and the NSP head are counted once a sequence. ``read`` tokens are read of the
    last layer's output (None: all): what follows its attention is computed for them alone.
    """
    layers, h, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
    dense = 4 * h * h + 2 * h * config.intermediate_size  # weights of a layer's products, each used once a token
    lengths = list(lengths)
    total = 0
    if read is not None:
        total -= 2 * (h * h + 2 * h * config.intermediate_size) * (sum(lengths) - read)
    for s in lengths:
        total += layers * (2 * dense * s + 4 * h * s * s) + 2 * h * h + 4 * h
    return total + predicted * (2 * h * h + 2 * h * vocabulary)


def step_flops(config, lengths: Iterable[int], predicted: int, *, train: bool, read: int | None = None) -> int:
    """FLOPs of one step: the forward, three times it in training."""
    return forward_flops(config, lengths, predicted, read) * (3 if train else 1)
