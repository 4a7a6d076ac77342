"""A recorder without a GPU: what a replayed graph does and does not do, with the function's Python run again."""

from bert_fast.train.cuda_graphs import Recorder


class Rerun(Recorder):
    """Replays by running the function again over the same tensors.

    As with a graph, recording runs nothing, what the function leaves in Python (``.grad`` of parameters) is gone after
    a replay, and every replay begins with the gradients that parameters had when it was recorded. ``broken`` numbers
    the recordings (from 0) that fail.
    """

    broken: tuple[int, ...] = ()

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.recordings = self.replays = 0

    def warm(self, function):
        function()

    def _wait(self):
        pass

    def _recorded(self, function):
        self.recordings += 1
        if self.recordings - 1 in self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        gradients = [p.grad for p in self.parameters]

        def replay():
            self.replays += 1
            with self._gradients_kept():
                for p, grad in zip(self.parameters, gradients, strict=True):
                    p.grad = grad
                function()

        return replay
