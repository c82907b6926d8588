"""What a command says and returns when it is stopped."""

import argparse
import os
import signal

import pytest

from fastvlm import cli


@pytest.fixture(autouse=True)
def handler():
    """`run` sets one for SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def stopped(*_):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("parser", [stopped, argparse.ArgumentParser], ids=["while it starts", "at work"])
def test_a_kill_is_one_line(parser, capsys):
    def build():
        built = parser()
        built.set_defaults(run=stopped)
        return built

    assert cli.run(build, []) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
