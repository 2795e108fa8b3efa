"""The command line: bad input ends at once with what is allowed; the view says what happens."""

import argparse
import io
import re

import pytest

from deepspeed_sentinel.demo import cli, live
from deepspeed_sentinel.demo.launch import environment, error_tail
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
        parse(
            *("--device", "cpu", "--attack", "random_sign", "--attack-arg", "rate=0.3"),
            *("--attacker", "2,0", "--attacker", "1,1"),
        )
    )
    options.save(tmp_path / "options.json")
    assert DemoOptions.load(tmp_path / "options.json") == options
    assert options.attack_arguments == {"rate": 0.3}
    assert options.attackers == ((2, 0), (1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "1"], "--stages must be from 2 to 8"),
        (["--steps", "30"], "--start-step must be from 0 to 29"),
        (["--attacker", "one"], "--attacker must be STAGE,REPLICA"),
        (["--attacker", "1,7"], "replicas 0 to 2"),
        (["--attacker", "3,0"], "sends no forward message"),
        (["--attacker", "1,2", "--attacker", "1,2"], "--attacker must name each worker once"),
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
    assert 'pip install ".[transformers,report]"' in capsys.readouterr().err


def test_only_the_attacked_and_guarded_runs_inject_and_only_defaults_guard():
    options = DemoOptions()
    attacked, guarded = options.sentinel_block("attacked"), options.sentinel_block("guarded")
    assert attacked["action"] == "observe"
    assert attacked["inject"] == guarded["inject"] == options.injections()
    assert [(one["stage"], one["replica"]) for one in guarded["inject"]] == [(1, 2), (2, 0)]
    assert set(guarded) == {"enabled", "output_dir", "events", "inject"}
    assert "inject" not in options.sentinel_block("overhead")


def test_processes_on_cpu_have_one_thread_each():
    assert environment(DemoOptions())["DS_ACCELERATOR"] == "cpu"
    assert environment(DemoOptions())["OMP_NUM_THREADS"] == "1"


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


OWN = [[0, 1, 2]] * 4
PACKED = [[0, 1, 2], [2, 1, 0], [0, 1, 2], [0, 1, 2]]
SCORES = [[0.5, 0.4, 0.3], [0.2, 0.2, 9.0], [7.0, None, 0.4], [0.1, 0.1, 0.1]]


def guard(step, wiring, blamed=(), excluded=(), convicted=(), twins=False, skip=False, told=()):
    return {
        "step": step,
        "warming_up": False,
        "scores": SCORES,
        "blamed": [list(worker) for worker in blamed],
        "excluded": list(excluded),
        "convicted": [list(worker) for worker in convicted],
        "skip": skip,
        "twins": twins,
        "wiring": wiring,
        "told": list(told),
    }


GUARDS = [
    {},
    guard(39, OWN),
    guard(40, OWN, [(1, 2), (2, 0)], [0, 1, 2], skip=True, told=["ALARM of two", "SKIPPED"]),
    guard(41, PACKED, [(1, 2), (2, 0)], [0], told=["DEALT ANEW"]),
    guard(42, PACKED, [], [0], [(1, 2)], twins=True),
    guard(43, PACKED, [(1, 2)], [0], [(1, 2), (2, 0)]),
]


@pytest.fixture
def state():
    run = RunState(losses=[3.0] * 20, seconds=[0.5] * 20, started=True, step_guard=GUARDS)
    state = DemoState(message="training")
    state.runs["guarded"] = run
    return state


def test_lines_tell_the_story_once(state, capsys):
    with live.PlainView(DemoOptions()) as plain:
        plain.update(state)
        plain.update(state)
    story = [line for line in capsys.readouterr().out.splitlines() if "step 4" in line]
    assert story == ["  step 40: ALARM of two", "  step 40: SKIPPED", "  step 41: DEALT ANEW"]


def test_lines_tell_what_happens_in_the_order_in_which_it_does(capsys):
    """All of a stream that comes in one piece, as it does where the machine is busy."""
    first, later = (
        guard(0, OWN, told=["ALARM stage 1 replica 2", "LEFT OUT"]),
        [guard(step, OWN) for step in range(1, 10)],
    )
    steps = [{"kind": "step", "loss": 3.0, "seconds": 0.5, "run": "guarded", "guard": one} for one in (first, *later)]
    stream = [
        {"kind": "message", "text": "Run 3"},
        *steps,
        {"kind": "message", "text": "Run 3: held-out"},
        {"kind": "run_end", "run": "guarded", "final_loss": 2.5},
        {"kind": "message", "text": "All runs done"},
    ]
    state = DemoState()
    with live.PlainView(DemoOptions()) as plain:
        cli.follow(stream, state, plain)
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "Run 3",
        "  step 0: ALARM stage 1 replica 2",
        "  step 0: LEFT OUT",
        "3 attacked, guarded: 10 of 60 steps done, training loss 3.000",
        "Run 3: held-out",
        "3 attacked, guarded: held-out loss 2.500",
        "All runs done",
    ]


def shown_of(state, width=170):
    """What the live view writes above its picture, and the picture."""
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    picture = live.LiveView(DemoOptions(), console)
    picture.update(state)
    picture.update(state)
    above = console.export_text()
    console.print(picture.render())
    return above, console.export_text()


def picture_of(state):
    return shown_of(state)[1]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_above_the_picture_stands_the_story_once_however_wide_the_terminal(state, width):
    long = "SUSPECT stage 2 replica 2: " + " ".join(["word"] * 20)
    state.runs["guarded"].step_guard = [*GUARDS, guard(44, PACKED, told=[long])]
    above, picture = shown_of(state, width)
    first, second, third, *rest = [line.rstrip() for line in above.splitlines()]
    assert [first, second, third] == ["step 40: ALARM of two", "step 40: SKIPPED", "step 41: DEALT ANEW"]
    assert rest[0].startswith("step 44: SUSPECT") and all(line.startswith(" " * 9) for line in rest[1:])
    assert max(map(len, picture.splitlines())) <= width


def test_picture_shows_who_serves_which_column_and_what_goes_on(state):
    shown = picture_of(state)
    assert "20/60" in shown
    assert "column 0 OUT" in shown and "column 1 OUT" not in shown and "column 2 OUT" not in shown
    (row,) = (line for line in shown.splitlines() if line.startswith("│  stage 1 "))
    assert row.index("r2 9.0 CONV.") < row.index("r1 0.2") < row.index("r0 0.2"), "the attacker serves column 0 now"
    assert "2 of 3" in shown
    assert re.search(r"steps skipped.*\b40\b", shown)
    assert "stage 1 replica 2, step 42 (alarm: 40)" in shown
    assert "stage 2 replica 0, step 43 (alarm: 40)" in shown


@pytest.mark.parametrize("width", [80, 100, 140])
def test_picture_is_whole_however_wide_the_terminal(state, width):
    losses = [3.25 + step / 1000 for step in range(60)]
    for name in ("clean", "attacked"):
        state.runs[name] = RunState(losses=losses, seconds=[0.5] * 60, started=True, ended=True, final_loss=2.701)
    state.message = live.MESSAGES["guarded"].format(start=30)
    shown = shown_of(state, width)[1]
    assert "…" not in shown and max(map(len, shown.splitlines())) <= width
    for text in (*live.TITLES.values(), "3.309", "2.701", "column 0 OUT", "column 1", "column 2", state.message):
        assert text in shown, text
    assert len(shown.splitlines()) <= 24, "a terminal's usual height"


def test_picture_stands_before_the_guarded_run_begins():
    assert "starts with run 3" in picture_of(DemoState())
