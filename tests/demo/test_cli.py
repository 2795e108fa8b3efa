"""The command line: bad input ends at once with what is allowed; the view says what happens."""

import argparse

import pytest

from deepspeed_sentinel.demo import cli, live
from deepspeed_sentinel.demo.launch import command, environment, error_tail
from deepspeed_sentinel.demo.options import DemoOptions
from deepspeed_sentinel.demo.progress import DemoState, RunState


def parse(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(list(arguments))


def test_defaults_of_the_command_line_are_the_options_defaults():
    assert cli.options_from(parse("--device", "cpu")) == DemoOptions()


def test_options_survive_the_file(tmp_path):
    options = cli.options_from(
        parse("--device", "cpu", "--attack", "random_sign", "--attack-arg", "rate=0.3", "--attacker", "2,0")
    )
    options.save(tmp_path / "options.json")
    assert DemoOptions.load(tmp_path / "options.json") == options
    assert options.attack_arguments == {"rate": 0.3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "1"], "--stages must be from 2 to 8"),
        (["--steps", "30"], "--start-step must be from 0 to 29"),
        (["--attacker", "one"], "--attacker must be STAGE,REPLICA"),
        (["--attacker", "1,7"], "replicas 0 to 2"),
        (["--attacker", "3,0"], "sends no forward message"),
        (["--attack", "magic"], "allowed: "),
        (["--attack-arg", "factor=big"], "--attack-arg must be NAME=VALUE"),
        (["--device", "cuda", "--stages", "8", "--replicas", "99"], "needs one GPU a process"),
    ],
)
def test_bad_input_ends_with_status_2_and_says_what_is_allowed(arguments, message, capsys, tmp_path):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert cli.run(parse("--out", str(tmp_path), *device, *arguments)) == 2
    assert message in capsys.readouterr().err


def test_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.run(parse()) == 2
    assert 'pip install "deepspeed-sentinel[transformers,report]"' in capsys.readouterr().err


def test_only_the_attacked_and_guarded_runs_inject_and_only_defaults_guard():
    options = DemoOptions()
    attacked, guarded = options.sentinel_block("attacked"), options.sentinel_block("guarded")
    assert attacked["action"] == "observe"
    assert attacked["inject"] == guarded["inject"] == [options.injection()]
    assert set(guarded) == {"enabled", "output_dir", "events", "inject"}
    assert "inject" not in options.sentinel_block("overhead")


def test_job_is_one_torchrun_of_all_workers(tmp_path):
    options = DemoOptions(stages=2, replicas=2)
    line = command(options, tmp_path / "options.json")
    assert line[line.index("--nproc-per-node") + 1] == "4"
    assert environment(options)["DS_ACCELERATOR"] == "cpu"
    assert environment(options)["OMP_NUM_THREADS"] == "1"


def test_error_tail_starts_at_the_first_traceback(tmp_path):
    log = tmp_path / "job.log"
    log.write_text("chatter\n" * 100 + "Traceback (most recent call last):\n  cause\n" + "more\n" * 100)
    assert error_tail(log, 3).splitlines() == ["Traceback (most recent call last):", "  cause", "more"]
    assert error_tail(tmp_path / "absent") == ""


def test_sparkline_shows_height_and_what_is_not_finite():
    line = live.sparkline([4.0, 3.0, 2.0, None], 4)
    assert line[0] == "█" and line[2] == "▁" and line[3] == "!"
    assert live.sparkline([], 10) == ""
    assert len(live.sparkline([1.0] * 500, 24)) == 24


GUARD = {
    "step": 41,
    "warming_up": False,
    "scores": [[0.5, 0.4, 0.3], [0.2, 0.2, 9.0], [0.3, None, 8.0], [0.1, 0.1, 0.1]],
    "blamed": [[1, 2]],
    "excluded": [2],
    "convicted": [[1, 2]],
    "skip": False,
}


def test_both_views_tell_of_alarm_exclusion_and_conviction(capsys):
    from rich.console import Console

    state = DemoState(message="training")
    state.runs["guarded"] = RunState(losses=[3.0] * 20, seconds=[0.5] * 20, started=True, step_guard=[GUARD])
    with live.PlainView(DemoOptions()) as plain:
        plain.update(state)
        plain.update(state)
    text = capsys.readouterr().out
    assert text.count("ALARM stage 1 replica 2; columns left out: [2]") == 1
    assert text.count("CONVICTED stage 1 replica 2") == 1
    picture = live.LiveView(DemoOptions())
    picture.update(state)
    console = Console(width=150, record=True)
    console.print(picture.render())
    shown = console.export_text()
    assert "CONV." in shown and "stage 1 replica 2" in shown and "20/80" in shown
