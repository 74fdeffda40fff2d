"""The command `synpo-fast` itself: what it lists exists, and it loads only what is called for."""

import importlib
import subprocess
import sys

import pytest

from synpo_fast.cli import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_is_listed_answers(name, capsys):
    _, module, function = COMMANDS[name]
    assert callable(getattr(importlib.import_module(module), function))
    try:
        status = main([name, "--help"])
    except SystemExit as end:  # argparse's way
        status = end.code
    shown = capsys.readouterr().out
    assert status == 0 and shown.startswith("usage:") and f"synpo-fast {name}" in shown


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--nope"]])
def test_a_wrong_command_says_which_there_are(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "usage: synpo-fast COMMAND" in error and all(name in error for name in COMMANDS)
    assert repr(arguments[0]) in error if arguments else "no command given" in error


def test_help_loads_no_command():
    code = "import sys, synpo_fast.cli as c; c.main(['--help']); print([m for m in sys.modules if m.startswith('synpo_fast.')])"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "pairs" in output and "synpo_fast.data" not in output.splitlines()[-1]
