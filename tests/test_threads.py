"""The thread beside: its results, its errors, and the core that it is kept off."""

import os
import sys
import threading

import pytest
import torch

from knnlm import threads
from knnlm.threads import BackgroundThread


def test_work_is_done_in_a_thread_of_its_own() -> None:
    one = BackgroundThread()
    thread, threads = one.begin(lambda: (threading.get_ident(), torch.get_num_threads())).result()
    assert thread != threading.get_ident()
    assert threads == 1
    assert one.begin(threading.get_ident).result() == thread
    one.close()
    with pytest.raises(RuntimeError):
        one.begin(threading.get_ident)


def test_an_error_comes_back() -> None:
    one = BackgroundThread()
    with pytest.raises(ZeroDivisionError):
        one.begin(lambda: 1 // 0).result()
    one.close()


@pytest.mark.skipif(sys.platform != "linux", reason="cores are asked for on Linux only")
def test_the_thread_is_kept_off_the_core_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)

    class AtCore:
        core = min(allowed)

        def sched_getcpu(self) -> int:
            return self.core

    asking = AtCore()
    monkeypatch.setattr(threads, "_C", asking)
    one = BackgroundThread()
    for core in (min(allowed), max(allowed)):
        asking.core = core
        cores = one.begin(lambda: os.sched_getaffinity(0)).result()
        assert cores == (allowed - {core} or allowed)
    one.close()
    assert os.sched_getaffinity(0) == allowed
