"""Ways in that need no engine of several processes."""

import sys
import types

import deepspeed
import pytest

from deepspeed_sentinel import flag, install


@pytest.fixture
def plain(monkeypatch):
    """deepspeed.initialize as in a process in which the flag is not seen, and a module that has it by name."""

    def initialize():
        return [types.SimpleNamespace(config={})]

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    user = types.ModuleType("somebodys_script")
    user.start, user.other = initialize, len
    monkeypatch.setitem(sys.modules, user.__name__, user)
    return initialize, user


def test_install_reaches_what_was_imported_by_name_and_can_be_undone(plain):
    original, user = plain
    uninstall = install()
    assert hasattr(deepspeed.initialize, "guarded_by_sentinel") and user.start is deepspeed.initialize
    assert user.other is len
    install()()
    assert user.start is deepspeed.initialize is not original, "what was there before is not undone"
    uninstall()
    assert user.start is deepspeed.initialize is original


def test_an_engine_whose_config_cannot_be_read_is_not_passed_over_in_silence(monkeypatch):
    lines = []
    monkeypatch.setattr(flag, "say", lines.append)
    assert flag.block_of(object()) is None
    assert lines == ["cannot read the config of object: if it has a block, it guards nothing"]
