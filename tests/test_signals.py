"""Signals that ask for the end: who hears them, how often, and what is put back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from truetune.system.signals import Stopped, handled, number_of, raised

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def as_before() -> object:
    before = {number: signal.getsignal(number) for number in ALL}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ALL)
def test_the_first_one_asks_and_interrupts_nothing(number: int) -> None:
    before = [signal.getsignal(each) for each in ALL]
    asked: list[int] = []
    with handled(asked.append):
        send(number)
        assert asked == [number]
        # A scheduler says it twice.
        send(signal.SIGTERM, signal.SIGHUP)
        assert asked == [number]
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert [signal.getsignal(each) for each in ALL] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_outside_of_a_run_it_ends_the_program(number: int) -> None:
    with raised(), pytest.raises(Stopped) as caught:
        send(number)
    assert number_of(caught.value) == number
    assert not isinstance(caught.value, Exception | KeyboardInterrupt)
    assert number_of(KeyboardInterrupt()) == signal.SIGINT


def test_one_that_a_destructor_swallowed_is_not_forgotten() -> None:
    asked: list[int] = []
    with raised():
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
        with handled(asked.append):
            assert asked == [signal.SIGTERM]
    # It is no business of the next command.
    with raised(), handled(asked.append):
        assert asked == [signal.SIGTERM]


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    asked: list[int] = []
    with raised(), handled(asked.append):
        send(signal.SIGHUP)
    assert asked == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_another_thread_leaves_signals_alone() -> None:
    before = [signal.getsignal(each) for each in ALL]
    inside: list[object] = []

    def work() -> None:
        with raised(), handled(lambda _: None):
            inside.extend(signal.getsignal(each) for each in ALL)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == before
