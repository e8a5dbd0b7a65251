"""Ctrl-C, SIGTERM and SIGHUP, in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from library.training.interrupts import interruptible

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX only")

LOOP = """
import itertools, logging, sys, time
from contextlib import nullcontext
from library.training.interrupts import interruptible
with interruptible() as interrupts:
    print("ready", flush=True)
    with interrupts.at_once() if sys.argv[1] == "at once" else nullcontext():
        while not interrupts:
            time.sleep(0.01)
    print("noted", flush=True)
    if sys.argv[1] == "slow":
        time.sleep(60)
print("saved", file=sys.stderr, flush=True)
raise SystemExit(interrupts.exit_code)
"""


def start(mode: str, before: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", before + LOOP, mode]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_is_noted_and_has_its_exit_code(number: signal.Signals, code: int) -> None:
    with start("loop") as process:
        process.send_signal(number)
        out, said = process.communicate(timeout=300)
    assert process.returncode == code and out == "noted\n"
    assert f"{number.name}: finishing this step" in said and said.endswith("saved\n")


def test_where_nothing_is_worth_waiting_for_it_ends_at_once() -> None:
    with start("at once") as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 143 and out == ""


def test_a_second_signal_stops_at_once() -> None:
    with start("slow") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stdout.readline() == "noted\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == -signal.SIGTERM


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    with start("loop", "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    assert process.returncode == 143


def test_a_terminal_that_is_gone_does_not_keep_anything_from_being_saved() -> None:
    with start("loop") as process:
        assert process.stderr is not None
        process.stderr.close()
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=300) == 129


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts and interrupts.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
