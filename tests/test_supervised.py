"""A process of its own for what may hang: it is asked, ended, and begun again."""

import os

import pytest

from bert_fast.supervised import Silent, Worker


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_serves_until_it_is_ended():
    with Worker("tests.support.made_trials:pid", start=60) as worker:
        first = worker.ask({}, 5)["pid"]
        assert worker.ask({}, 5)["pid"] == first != os.getpid()
    assert not alive(first)


def test_after_silence_another_goes_on():
    with Worker("tests.support.made_trials:answer", start=60) as worker:
        ask = {"incumbent": {}, "challenger": {}}
        worker.ask(ask, 5)
        pid = worker._process.pid
        with pytest.raises(Silent, match="no answer in time"):
            worker.ask(ask | {"challenger": {"made": {"does": "hang"}}}, 0.3)
        assert not alive(pid)
        with pytest.raises(Silent, match="status 3"):
            worker.ask(ask | {"challenger": {"made": {"does": "die"}}}, 5)
        assert worker.ask(ask, 5)["replaced"] == {}


def test_a_function_that_is_not_there_is_no_hang():
    with Worker("tests.support.made_trials:nothing", start=60) as worker, pytest.raises(Silent, match="status 1"):
        worker.ask({}, 5)
