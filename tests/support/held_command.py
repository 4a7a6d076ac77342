"""bert-fast that stays where a test wants to meet it, on a machine of any speed.

python held_command.py UPDATES pretrain ...   does that many updates, and waits until a signal asks the run to stop
"""

import signal
import sys
import time

from bert_fast import cli
from bert_fast.train.step import Step


def hold(updates: int) -> None:
    apply, done = Step.__call__, []

    def held(*args, **kwargs):
        # a run's own handler is gone once it was asked
        while len(done) >= updates and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            time.sleep(0.01)
        done.append(True)
        return apply(*args, **kwargs)

    Step.__call__ = held


if __name__ == "__main__":
    hold(int(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
