"""summary.json from a recorded stream: every number is checked against what the stream says."""

import json
import subprocess

import pytest

from deepspeed_sentinel.demo import report, summary
from deepspeed_sentinel.demo.options import DemoOptions
from deepspeed_sentinel.demo.progress import Reader, Writer, fold

OPTIONS = DemoOptions(steps=60, start_step=40, attack="scaling", attack_arguments={"factor": -1})


def alarm(step, stage, replica, micro_batches=(0, 1, 2, 3)):
    worker = {"stage": stage, "replica": replica}
    return {"kind": "alarm", "step": step, **worker, "micro_batches": list(micro_batches)}


def conviction(step, stage, replica):
    return {"kind": "conviction", "step": step, "stage": stage, "replica": replica}


def dealt(step, *moved):
    return {"kind": "wiring", "step": step, "moved": [list(move) for move in moved]}


def scores(step, hot=()):
    rows = [[5.0 if (stage, replica) in hot else 0.4 for replica in range(3)] for stage in range(4)]
    return {"kind": "step", "step": step, "scores": rows, "excluded": [], "warming_up": step < 20}


@pytest.fixture
def lines():
    stream = [{"kind": "message", "text": "hello"}]
    for name, final in (("clean", 2.5), ("attacked", None), ("guarded", 2.6)):
        stream.append({"kind": "run_start", "run": name})
        stream += [
            {"kind": "step", "run": name, "step": step, "loss": 5.0 - step / 30, "seconds": 0.5} for step in range(60)
        ]
        counts = {} if name == "clean" else {"judged_messages": 4320, "skipped_steps": 1}
        stream.append({"kind": "run_end", "run": name, "final_loss": final, "counts": counts})
    stream += [{"kind": "overhead", "guarded": False, "seconds": seconds} for seconds in (0.5, 0.5, 9.0)]
    stream += [{"kind": "overhead", "guarded": True, "seconds": seconds} for seconds in (0.6, 0.6, 0.1)]
    return [*stream, {"kind": "done"}]


EVENTS = [
    *(scores(step, hot={(1, 2), (2, 2)} if step >= 40 else ()) for step in range(60)),
    alarm(30, 1, 2, [1]),  # the later attacker, but before it attacks: false
    alarm(41, 1, 2),
    alarm(42, 1, 2),
    alarm(43, 1, 2),
    conviction(43, 1, 2),
    dealt(44, (1, 2, 2, 0), (1, 0, 0, 2)),
    alarm(45, 2, 1, [0, 3]),  # an honest worker: false, two messages
    alarm(46, 2, 0),
    {"kind": "excluded", "step": 45, "columns": [0, 1]},
    {"kind": "excluded", "step": 46, "columns": [0, 1, 2]},
    {"kind": "skipped", "step": 46},
    {"kind": "skipped", "step": 47},
    conviction(50, 2, 0),
    conviction(51, 2, 1),
    dealt(52, (2, 1, 1, 2), (2, 2, 2, 1)),
]


def test_numbers_follow_from_the_stream(lines):
    result = summary.summarise(OPTIONS, fold(lines), EVENTS)
    runs, measured = {"clean", "attacked", "guarded"}, {"overhead", "step_seconds", "machine"}
    assert set(result) == {"mesh", "steps", "attack", "attackers", "columns", "skipped", *runs, *measured}
    assert result["mesh"] == {"stages": 4, "replicas": 3}
    assert result["attack"]["factor"] == -1
    assert result["attackers"] == [
        {"stage": 1, "replica": 2, "found_step": 41, "convicted_step": 43},
        {"stage": 2, "replica": 0, "found_step": 46, "convicted_step": 50},
    ]
    # Two of stage 2 are convicted, so no dealing does with fewer than two columns: replicas 0 and 1 serve 0 and 2.
    wiring = [[0, 1, 2], [2, 1, 0], [0, 2, 1], [0, 1, 2]]
    assert result["columns"] == {"dealt_steps": [44, 52], "wiring": wiring, "going_on": 1}
    assert result["clean"] == {"final_loss": 2.5, "steps_per_s": pytest.approx(2.0)}
    assert result["attacked"] == {"final_loss": None}
    assert result["skipped"] == {"all_columns_out": [46], "other": [47]}
    assert result["overhead"] == pytest.approx(1.2)
    plain, guarded = result["step_seconds"]["plain"], result["step_seconds"]["guarded"]
    assert plain == {"steps": 3, "quartile_1": 0.5, "median": 0.5, "quartile_3": pytest.approx(4.75)}
    assert guarded == {"steps": 3, "quartile_1": pytest.approx(0.35), "median": 0.6, "quartile_3": 0.6}
    assert result["machine"]["device"] == "cpu" and result["machine"]["processes"] == 12
    assert result["guarded"] == {
        "final_loss": 2.6,
        "steps_per_s": pytest.approx(2.0),
        "convicted": [[1, 2], [2, 0], [2, 1]],
        "false_convictions": 1,
        "false_alarms": 3,
        "judged_messages": 4320,
        "skipped_steps": 1,
    }
    json.dumps(result, allow_nan=False)


def test_convicting_the_attacker_before_it_attacks_is_false_too(lines):
    result = summary.summarise(OPTIONS, fold(lines), [conviction(12, 1, 2)])
    assert result["guarded"]["false_convictions"] == 1
    assert [one["convicted_step"] for one in result["attackers"]] == [None, None]
    assert [one["found_step"] for one in result["attackers"]] == [None, None]


def test_overhead_that_was_not_measured_is_null():
    assert summary.overhead([], [0.5]) is None
    assert summary.spread([]) is None
    assert summary.spread([0.5]) == {"steps": 1, "quartile_1": 0.5, "median": 0.5, "quartile_3": 0.5}


def rows_of(lines, events=EVENTS):
    return dict(summary.table_rows(summary.summarise(OPTIONS, fold(lines), events)))


def test_overhead_is_told_with_its_spread_and_what_it_does_not_tell(lines):
    told = rows_of(lines)["time of a step with Sentinel"]
    assert told.startswith("+20 % over plain DeepSpeed, no attack: medians of 3 and 3 steps")
    assert "with: 0.60 s, quartiles 0.35 to 0.60\nwithout: 0.50 s, quartiles 0.50 to 4.75" in told
    assert "tiny model on 12 processes that share" in told and "docs/operations.md" in told
    unmeasured = [line for line in lines if line["kind"] != "overhead"]
    assert rows_of(unmeasured)["time of a step with Sentinel"] == "not measured"


def test_skipped_steps_are_told_with_why(lines):
    told = rows_of(lines)["skipped steps"]
    assert told.startswith("2 of 60, and no weight changed: in 46 every column was left out; in 47 for another reason")
    unskipped = [event for event in EVENTS if event["kind"] != "skipped"]
    assert rows_of(lines, unskipped)["skipped steps"] == "none of 60: a column was left in each"


def test_report_writes_all_files(lines, tmp_path, capsys):
    options = DemoOptions(steps=60, start_step=40, out=str(tmp_path))
    folder = options.sentinel_folder("guarded")
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    report.write(options, fold(lines))
    for name in ("summary.json", "events.jsonl", "loss.png", "evidence.png"):
        assert (tmp_path / name).stat().st_size > 100
    shown = capsys.readouterr().out
    assert "not finite" in shown and "\x1b" not in shown, "no colours where there is no terminal"
    assert "found in step 41, convicted in step 43" in shown and "found in step 46, convicted in step 50" in shown
    assert "for steps 44, 52" in shown and "1 of 3" in shown
    command = shown.splitlines()[-1].removeprefix("More about the guarded run: ")
    reported = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert reported.returncode == 0, reported.stderr
    assert "stage 1, replica 2" in reported.stdout


def test_writer_and_reader_hand_over_whole_lines_only(tmp_path):
    path = tmp_path / "progress.jsonl"
    read = Reader(path)
    assert read() == []
    write = Writer(path, active=True)
    write("message", text="one")
    with path.open("a") as file:
        file.write('{"kind": "mess')
    assert read() == [{"kind": "message", "text": "one"}]
    with path.open("a") as file:
        file.write('age", "text": "two"}\n')
    assert read() == [{"kind": "message", "text": "two"}]
    Writer(tmp_path / "other", active=False)("message", text="nothing")
    assert not (tmp_path / "other").exists()


def test_unknown_line_is_an_error():
    with pytest.raises(ValueError, match="surprise"):
        fold([{"kind": "surprise"}])
