"""A CUDA graph without a GPU: what was recorded is replayed operation by operation, and none of the function's Python.

A graph replays device work with the arguments of the time when it was recorded: a learning rate read as a number then,
a branch taken then, an address of then. Running the function again (``recorded_runs.Rerun``) would hide that; here each
call of PyTorch's dispatcher and each launch of a Triton kernel (by its interpreter) is written down and done again over
the same memory. Between replays everything that a recording made is poisoned, as a pool that all graphs share may hold
anything then: what a replay reads must have been there before, or be made by that replay.
"""

import contextlib
import gc
from unittest import mock

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from bert_fast.train.cuda_graphs import Recorder

Tensor = torch.Tensor

# Nobody's work on a device.
_MAKE_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# What waits for the device, or makes as much as values say: a stream that is being recorded refuses it.
_WAIT = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> Tensor:
    """All of the tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _in_place(function) -> bool:
    return any(
        argument.alias_info is not None and argument.alias_info.is_write for argument in function._schema.arguments
    )


class Operations(TorchDispatchMode):
    """Writes down what is done within: in ``done`` functions that do it again, in ``made`` the memory it made."""

    def __init__(self):
        super().__init__()
        self.done, self.names, self.made = [], [], {}
        self._inside_kernel = self._inside_operator = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._inside_kernel:
            return function(*args, **kwargs)
        if function.namespace == "bert_fast":  # what it does on a device is what its implementation launches
            return self._opened(function, args, kwargs)
        name = function.overloadpacket.__name__
        if name in _WAIT and not self._inside_operator:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        given = {_storage(t) for t in _tensors((args, kwargs))}
        out = function(*args, **kwargs)
        fresh = [t for t in _tensors(out) if t.numel() and _storage(t) not in given]
        self.made.update((_storage(t), t) for t in fresh)
        if name not in _MAKE_MEMORY and (fresh or _in_place(function)):
            self.names.append(name)
            self.done.append(lambda: self._again(function, args, kwargs, out))
        return out

    def _opened(self, function, args, kwargs):
        """On a CPU operators check values, which they do not on a GPU; that no launcher reads one is tested apart."""
        self._inside_operator = True
        try:
            with self:
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        finally:
            self._inside_operator = False

    @staticmethod
    def _again(function, args, kwargs, out) -> None:
        found = function(*args, **kwargs)
        for old, new in zip(_tensors(out), _tensors(found), strict=True):
            if old.numel() and _storage(old) != _storage(new):
                assert (old.shape, old.dtype) == (new.shape, new.dtype)
                old.copy_(new)

    def _launched(self, launch, kernel, *args, **kwargs) -> None:
        def again():
            self._inside_kernel = True
            try:
                launch(kernel, *args, **kwargs)
            finally:
                self._inside_kernel = False

        again()
        self.names.append(kernel.__name__)
        self.done.append(again)

    @contextlib.contextmanager
    def recording(self):
        launch = InterpretedFunction.run

        def run(kernel, *args, **kwargs):
            self._launched(launch, kernel, *args, **kwargs)

        with mock.patch.object(InterpretedFunction, "run", run), self:
            yield


class Replay(Recorder):
    """Records operations and launches, and replays these alone.

    Recording runs the function, which is how its operations are known; then all memory and the generator are put back
    to what they were. ``replayed`` has the names of what the last replay did.
    """

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.recordings: list[Operations] = []
        self.replayed: list[str] = []

    def warm(self, function):
        function()

    def forget(self):
        self.recordings = []

    def _wait(self):
        pass

    def _recorded(self, function):
        operations = Operations()
        with _everything_put_back(), operations.recording():
            function()
        self.recordings.append(operations)

        def replay():
            for recording in self.recordings:  # one pool
                for tensor in recording.made.values():
                    _bytes(tensor).fill_(255)  # NaN, or -1
            with torch.no_grad():
                for again in operations.done:
                    again()
            self.replayed = operations.names

        return replay


@contextlib.contextmanager
def _everything_put_back():
    """Of every tensor that Python knows before the memory, and the generator's state. What torch.compile and torch.func
    leave behind, fake tensors and wrapped ones, has none."""
    gc.collect()
    known = {
        _storage(t): t.detach()
        for t in gc.get_objects()
        if type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and t.numel()
        and not is_functorch_wrapped_tensor(t)
    }
    saved = [(t, _bytes(t).clone()) for t in known.values()]
    with torch.random.fork_rng([]):
        yield
    for tensor, before in saved:
        _bytes(tensor).copy_(before)
