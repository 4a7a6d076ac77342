"""A whole training step in one CUDA graph: forward, backward, clipping and the optimiser's update.

A step of BERT is about a thousand small launches. Recorded once as a graph they are replayed with one call, and the
CPU stays out: nothing in a step over packed batches depends on what a tensor holds, only on the fixed capacities.

    sizes           every batch has the shapes of the first (bert_fast.data.pack_samples with the same capacities) and
                    is copied into buffers that the graph reads; attention is bounded by one fixed ``max_length``
    dropout         the key of each forward comes from torch's generator, whose offset advances on the device at every
                    replay: the same keys, in the same order, as eager steps draw
    learning rate   one float32 element on the device, which the optimiser reads
    optimiser       clips, counts its steps and decides to skip one (gradients that are not finite) on the device

The first ``warmup`` steps run eagerly: they are training steps like the others, and what they build (compiled kernels,
the optimiser's state, the libraries' workspaces) is not made again. Recording runs nothing. So steps with and without
a graph give the same bits.

Source of the method: PyTorch's notes on CUDA graphs, "Whole-network capture".
"""

import contextlib

import torch

Tensor = torch.Tensor


class CapturedStep:
    """Training steps of one process over packed batches of fixed capacities, replayed from a graph on a GPU.

    ``model``      a pre-training model of bert_fast, on one device, in training mode
    ``optimizer``  of bert_fast.optim, over the model's parameters; its groups all get this step's learning rate
    ``batch``      an example (of bert_fast.data.pack_samples): names, shapes and dtypes of every batch to come
    ``max_length`` no sequence of any batch is longer (tokens)
    ``autocast``   the dtype of products under autocast, or None for the parameters' own
    ``capture``    False runs every step eagerly, on any device; the numbers are the same
    ``warmup``     eager steps before the graph is recorded, at least 1

    Raises ValueError for ``capture`` without a GPU or in a distributed run, where gradients meet between the ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: dict,
        *,
        max_length: int,
        autocast: torch.dtype | None = None,
        capture: bool = True,
        warmup: int = 3,
    ):
        self._first_parameter = next(model.parameters())
        device = self._first_parameter.device
        if capture and device.type != "cuda":
            raise ValueError(
                f"CapturedStep: the model is on {device}, and only a GPU has CUDA graphs: move the model, or give "
                "capture=False for the same steps without one"
            )
        if capture and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ValueError(
                "CapturedStep records the step of a single process, but torch.distributed is initialised: give "
                "capture=False"
            )
        if warmup < 1:
            raise ValueError(f"CapturedStep: warmup is {warmup}, expected at least 1: it builds the optimiser's state")
        self.model, self.optimizer, self.device = model, optimizer, device
        self.max_length, self.autocast, self.warmup = max_length, autocast, warmup
        self._inputs = {
            name: value.to(device, copy=True) for name, value in batch.items() if isinstance(value, torch.Tensor)
        }
        self._check(batch)
        self.learning_rate = torch.zeros((), dtype=torch.float32, device=device)
        self.loss: Tensor | None = None
        self._capture, self._stream = capture, torch.cuda.Stream(device) if capture else None
        self.reset()

    def reset(self) -> None:
        """Forget the graph: the next steps run eagerly, then it is recorded again.

        Happens by itself where the model was moved or the optimiser's state loaded, since a graph reads addresses.
        """
        self._graph, self._eager_steps = None, 0
        self._address = self._first_parameter.data_ptr()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    @property
    def captured(self) -> bool:
        """Whether the next step replays the graph."""
        return self._graph is not None

    def __call__(self, batch: dict, learning_rate: float, *, seed: int | None = None) -> Tensor:
        """One step on ``batch`` (tensors on any device); returns its loss, float32 (), on the device.

        ``seed`` fixes the step's dropout masks (torch.manual_seed); without it the generator goes on. The loss is
        the graph's own memory: the next step overwrites it. Raises ValueError for a batch that does not fit.
        """
        self._check(batch)
        if self._address != self._first_parameter.data_ptr() or any(
            group["lr"] is not self.learning_rate for group in self.optimizer.param_groups
        ):
            self.reset()
        for name, buffer in self._inputs.items():
            buffer.copy_(batch[name], non_blocking=True)
        self.learning_rate.fill_(learning_rate)
        if seed is not None:
            torch.manual_seed(seed)
        if self._capture and self._graph is None and self._eager_steps >= self.warmup:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self.loss = self._eager()
            self._eager_steps += 1
        return self.loss

    def _check(self, batch: dict) -> None:
        """``batch`` has the names, shapes and dtypes of the example, and no sequence beyond ``max_length``."""
        if batch.keys() - {"max_length_q"} != self._inputs.keys():
            raise ValueError(
                f"CapturedStep: the batch has {sorted(batch)}, expected {sorted(self._inputs)} (tensors) and "
                "max_length_q"
            )
        for name, buffer in self._inputs.items():
            value = batch[name]
            if not isinstance(value, torch.Tensor) or value.shape != buffer.shape or value.dtype != buffer.dtype:
                found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
                raise ValueError(
                    f"CapturedStep: {name} is {found}, expected {tuple(buffer.shape)} {buffer.dtype}: pack every batch "
                    "to the same capacities (bert_fast.data.pack_samples)"
                )
        if batch.get("max_length_q", self.max_length) > self.max_length:
            raise ValueError(
                f"CapturedStep: the batch has a sequence of {batch['max_length_q']} tokens, more than max_length "
                f"{self.max_length}"
            )

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        context = contextlib.nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with context:
            loss = self.model(**self._inputs, max_length_q=self.max_length, return_logits=False).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach().float()

    def _eager(self) -> Tensor:
        """A step on the stream that will be recorded, so that autograd's own streams are the same then."""
        if self._stream is None:
            return self._step()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            loss = self._step()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return loss

    def _record(self) -> None:
        """Record a step without running it; its gradients and activations get the graph's own memory."""
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # relaxed: pinned memory may be allocated meanwhile (the optimiser's table of addresses, a loader's thread);
        # what would wait for the recorded stream is an error all the same
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="relaxed"),
            ):
                loss = self._step()
        except RuntimeError as error:
            error.add_note(
                "while CapturedStep recorded the step: something in it waits for the device or depends on a tensor's "
                "value (a hook of your own?); capture=False trains without a graph"
            )
            raise
        self._graph, self.loss = graph, loss
