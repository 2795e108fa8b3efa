import json

import pytest

from deepspeed_sentinel.__main__ import main
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.config_file import load_block
from deepspeed_sentinel.mesh import Mesh

FAULT = {"stage": 1, "replica": 2, "attack": "scaling", "factor": -1}


def test_enabled_is_enough_and_the_default_is_off():
    assert not SentinelConfig.parse({}).enabled
    config = SentinelConfig.parse({"enabled": True})
    assert (config.action, config.activation_decay, config.gradient_decay) == (None, 0.9, 0.8)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"warmup": 5}, ["sentinel.warmup", "unknown key", 'did you mean "warmup_steps"?']),
        ({"acton": "halt"}, ['sentinel.acton: unknown key (value "halt"); did you mean "action"?']),
        ({"xyz": 1}, ["sentinel.xyz: unknown key (value 1); allowed: enabled, action, "]),
        ({"twins": {"evry": 5}}, ['sentinel.twins.evry: unknown key (value 5); did you mean "every"?']),
        ({"twins": 100}, ['sentinel.twins: got 100; must be an object such as {"every": 100}']),
        ({"twins": {"columns": "x"}}, ["sentinel.twins.columns: got \"x\"; Input should be 'all' or a valid integer"]),
        ({"prometheus": True}, ['sentinel.prometheus: got true; must be an object such as {"port": 9400}']),
        ({"inject": FAULT}, ['must be a list such as [{"stage": 1, "replica": 2, "attack": "scaling"}]']),
        ({"inject": [5]}, ['inject.0: got 5; must be an object such as {"stage": 1, "replica": 2, "attack": ']),
        ({"enabled": "yes"}, ["sentinel.enabled", '"yes"', "boolean"]),
        ({"action": "ban"}, ["sentinel.action", '"ban"', "'observe', 'exclude', 'quarantine' or 'halt'"]),
        ({"warmup_steps": 1}, ["sentinel.warmup_steps", "1", "greater than or equal to 2"]),
        ({"warmup_steps": 5.5}, ["sentinel.warmup_steps", "5.5", "integer"]),
        ({"activation_decay": 1.0}, ["sentinel.activation_decay", "1.0", "less than 1"]),
        ({"gradient_decay": 0.0}, ["sentinel.gradient_decay", "0.0", "greater than 0"]),
        ({"fence_window": 4}, ["sentinel.fence_window", "4", "greater than or equal to 8"]),
        ({"fence_multiplier": 0.5}, ["sentinel.fence_multiplier", "0.5"]),
        (
            {"target_false_positive_rate": 0.5},
            ["sentinel.target_false_positive_rate", "0.5", "less than 0.1"],
        ),
        ({"strikes": 0}, ["sentinel.strikes", "0"]),
        ({"strikes": 9, "strike_window": 4}, ["strikes (9)", "strike_window (4)"]),
        ({"warmup_steps": 99}, ["warmup_steps (99)", "fence_window (64)"]),
        ({"probation_steps": 0}, ["sentinel.probation_steps", "0"]),
        ({"max_skipped_steps": 0}, ["sentinel.max_skipped_steps", "0"]),
        ({"weights_every": -1}, ["sentinel.weights_every", "-1", "greater than or equal to 0"]),
        ({"output_dir": ""}, ["sentinel.output_dir"]),
        ({"events": "all"}, ["sentinel.events", '"all"', "'none', 'alarms' or 'steps'"]),
        ({"seed": -1}, ["sentinel.seed", "-1"]),
        ({"inject": [{**FAULT, "attack": "magic"}]}, ["sentinel.inject.0", "'magic'", "bit_flip", "scaling"]),
        ({"inject": [{**FAULT, "power": 3}]}, ["sentinel.inject.0", "'power'", "factor"]),
        ({"inject": [{**FAULT, "factor": "big"}]}, ["sentinel.inject.0", "factor", "'big'"]),
        (
            {"inject": [{**FAULT, "direction": "up"}]},
            ["sentinel.inject.0.direction", '"up"', "'forward' or 'backward'"],
        ),
        (
            {"inject": [{**FAULT, "where": "wire"}]},
            ["sentinel.inject.0.where", "'compute', 'transit', 'report' or 'sketch'"],
        ),
        (
            {"inject": [{"stage": 1, "replica": 2, "attack": "replay", "where": "sketch"}]},
            ["sentinel.inject.0", "'replay'", "where='sketch'", "without memory"],
        ),
        ({"inject": [{**FAULT, "probability": 2.0}]}, ["sentinel.inject.0.probability", "2.0"]),
        (
            {"inject": [{**FAULT, "start_step": 9, "stop_step": 9}]},
            ["sentinel.inject.0", "stop_step (9)", "start_step (9)"],
        ),
        ({"inject": [{"stage": 0}]}, ["sentinel.inject.0.attack", "required"]),
        ("on", ['"sentinel" must be an object', '"on"']),
    ],
)
def test_mistakes_name_key_value_and_what_is_allowed(block, said):
    with pytest.raises(ValueError) as error:
        SentinelConfig.parse(block)
    for part in said:
        assert part in str(error.value)


def test_with_another_action_all_that_follows_from_it_is_another(tmp_path):
    heals = SentinelConfig.parse({"enabled": True, "inject": [FAULT], "twins": {"every": 5}})
    observes, back = (heals.with_action(action, Mesh(4, 3)) for action in ("observe", "quarantine"))
    assert (observes.action, observes.wiring, observes.tries_suspects) == ("observe", "static", False)
    assert (back.action, back.wiring, back.tries_suspects) == ("quarantine", "heal", True)
    assert back == heals.of_mesh(Mesh(4, 3)), "and nothing else"
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "mine.py").write_text("class Mine: ...")
        patch.chdir(tmp_path)
        drill = SentinelConfig.parse({"enabled": True, "inject": [{**FAULT, "attack": "mine.py:Mine"}]})
        patch.chdir("/")
        assert drill.with_action("observe", Mesh(4, 3)).inject == drill.inject, "wherever the script stands by then"
    for action in ("ban", None):
        with pytest.raises(ValueError, match=r"sentinel\.action: got .*, allowed are 'observe', 'exclude', "):
            heals.with_action(action, Mesh(4, 3))


@pytest.mark.parametrize("block", [name for name, one in SentinelConfig.model_fields.items() if one.examples])
def test_what_is_given_as_an_example_is_right(block):
    (example,) = SentinelConfig.model_fields[block].examples
    SentinelConfig.parse({block: example} if block != "prometheus" else {})


def test_no_mistake_is_told_with_the_name_of_a_class_of_ours():
    for name in SentinelConfig.model_fields:
        for value in (object(), 3.25, [3], {"a": 1}):
            try:
                SentinelConfig.parse({name: value})
            except ValueError as error:
                assert "Config" not in str(error) and "Injection" not in str(error) and "tuple" not in str(error)


def test_every_mistake_is_listed_at_once():
    with pytest.raises(ValueError) as error:
        SentinelConfig.parse({"action": "ban", "strikes": 0, "typo": 1})
    assert all(key in str(error.value) for key in ("action", "strikes", "typo"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"stage": 7, "replica": 0}, "stages 0 to 3 and replicas 0 to 2"),
        ({"stage": 0, "replica": 3}, "stages 0 to 3 and replicas 0 to 2"),
        ({"stage": 3, "replica": 0, "direction": "forward"}, "stage 3 sends no forward message"),
        ({"stage": 0, "replica": 0, "direction": "backward"}, "stage 0 sends no backward message"),
        (
            {"stage": 0, "replica": 0, "direction": "forward", "where": "report"},
            "stage 0 receives no forward message",
        ),
        (
            {"stage": 3, "replica": 0, "direction": "backward", "where": "report"},
            "stage 3 receives no backward message",
        ),
    ],
)
def test_faults_outside_the_mesh_are_refused(fault, said):
    config = SentinelConfig.parse({"inject": [{"attack": "nan", **fault}]})
    with pytest.raises(ValueError, match=said):
        config.inject[0].check_mesh(Mesh(4, 3))


def test_only_who_has_a_partner_two_stages_away_can_lie_in_its_sketches():
    (entry,) = SentinelConfig.parse({"inject": [{**FAULT, "where": "sketch"}]}).inject
    entry.check_mesh(Mesh(4, 3))
    with pytest.raises(ValueError, match="stage 1 of 3 keeps no secret sketches"):
        entry.check_mesh(Mesh(3, 3))


def test_one_stage_is_refused():
    with pytest.raises(ValueError, match="at least 2 pipeline stages, got 1"):
        Mesh(1, 4)


def test_check_prints_effective_settings(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 8, "sentinel": {"enabled": True, "strikes": 5}}))
    assert main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "* strikes = 5" in out and "  warmup_steps = 20" in out
    assert load_block(str(path)) == {"enabled": True, "strikes": 5}


def test_check_reads_what_deepspeed_reads(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(
        '{\n  // a drill\n  "sentinel": {"enabled": true, "inject": [{"stage": 1, "replica": 0, "attack": "nan"},]},\n}'
    )
    assert main(["check", str(path)]) == 0
    assert '"attack": "nan"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"sentinel": {"strikes": 0}}', "sentinel.strikes"),
        ('{"sentinel": {"strikes": {"a": 1}}}', 'got {"a": 1}'),
        ('{"sentinel": true}', "got true."),
        ('{"sentinel": {"enabled": null}}', "got null; "),
        ('{"sentinel": {"twins": {"evry": 5}}}', 'did you mean "every"?'),
        ('{"sentinel": {"twins": {"x": 5}}}', "allowed: on_suspicion, every, replay, columns"),
        ("{", "Bad key name"),
        (None, "No such file"),
    ],
)
def test_check_fails_with_the_reason(tmp_path, capsys, content, said):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    assert main(["check", str(path)]) == 1
    told = capsys.readouterr().err
    assert said in told and told.count(str(path)) == 1 and "OrderedDict" not in told


@pytest.mark.parametrize("of_file", ["plain", "inner"])
def test_a_file_runs_only_once_the_attack_is_built(tmp_path, capsys, of_file):
    script, ran = tmp_path / "attack.py", tmp_path / "ran"
    script.write_text(
        f"open({str(ran)!r}, 'w')\nclass Mine:\n    def __call__(self, message, context): return message\n"
    )
    name = f"{script}:Mine"
    fault = {"attack": name} if of_file == "plain" else {"attack": "intermittent", "inner": name}
    block = {"enabled": False, "inject": [{"stage": 1, "replica": 0, **fault}]}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"sentinel": block}))
    assert main(["check", str(path)]) == 0 and name in capsys.readouterr().out
    assert not ran.exists()
    (injection,) = SentinelConfig.parse(block).inject
    assert not ran.exists()
    injection.check_attack()
    assert ran.exists()


def test_what_can_be_seen_of_a_file_without_running_it_is_checked(tmp_path):
    for name, said in ((f"{tmp_path}/none.py:Mine", "there is no file"), (f"{tmp_path}/none.py", "say which class")):
        with pytest.raises(ValueError, match=said):
            SentinelConfig.parse({"inject": [{"stage": 1, "replica": 0, "attack": name}]})


@pytest.mark.parametrize(
    ("block", "how"),
    [({}, 'add "enabled": true to the block'), ({"enabled": False, "action": "halt"}, 'set "enabled" to true')],
)
def test_check_says_when_it_is_switched_off(tmp_path, capsys, block, how):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"sentinel": block}))
    assert main(["check", str(path)]) == 0
    assert f"{path}: valid, but switched off: {how}" in capsys.readouterr().out
    path.write_text(json.dumps({"sentinel": {**block, "enabled": True}}))
    assert main(["check", str(path)]) == 0
    assert f"{path}: valid. Settings" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nothing.py", "."])
def test_run_says_in_a_line_that_there_is_no_such_script(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", name]) == 2
    assert capsys.readouterr().err == f"run: {name}: there is no such file\n"


def test_check_says_when_there_is_no_block(tmp_path, capsys):
    path = tmp_path / "ds.json"
    for text in ("{}", "", '{"sentinel": null}'):
        path.write_text(text)
        assert main(["check", str(path)]) == 0
        said = capsys.readouterr().out
        assert "stays off" in said and "valid" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"sentinal": {"enabled": true}}', 'guards nothing; did you mean "sentinel"?'),
        ('{"sentinel": ', "not valid JSON"),
        ('{"sentinel": {"enabled": true}, "zero_optimization": {"stage": 3}}', "takes ZeRO stages 0 and 1"),
        ('{"sentinel": {"enabled": true}, "zero_optimization": {"stage": "2"}}', 'stage: got "2"'),
        ("[1]", "a DeepSpeed config is a JSON object, not a list"),
    ],
)
def test_check_refuses_what_would_guard_nothing(tmp_path, capsys, text, said):
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert main(["check", str(path)]) == 1
    assert said in capsys.readouterr().err


def test_run_gives_the_script_its_arguments(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, deepspeed, helper\n"
        "print(sys.argv[1:], deepspeed.initialize.__globals__['__name__'], helper.HERE)\n"
    )
    (tmp_path / "helper.py").write_text("HERE = True\n")
    import deepspeed

    before = deepspeed.initialize
    try:
        assert main(["--local_rank=0", "run", str(script), "--lr", "3"]) == 0
    finally:
        deepspeed.initialize = before
    assert "['--local_rank=0', '--lr', '3'] deepspeed_sentinel.flag True" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("block", "replicas", "convicts"),
    [
        ({}, 3, "proof"),
        ({}, 2, "statistics"),
        ({"twins": {"on_suspicion": False}}, 3, "statistics"),
        ({"twins": {"on_suspicion": False, "every": 9}}, 3, "proof"),
        ({"action": "observe"}, 3, "statistics"),  # who only observes changes nobody's data
        ({"conviction": "statistics", "twins": {"every": 9}}, 8, "statistics"),
        ({"conviction": "proof"}, 2, "proof"),
    ],
)
def test_proof_convicts_where_there_can_be_any(block, replicas, convicts):
    assert SentinelConfig.parse({"enabled": True, **block}).convicts_by(Mesh(4, replicas)) == convicts


@pytest.mark.parametrize(
    ("block", "replicas", "said"),
    [
        ({"twins": {"columns": 4}}, 8, ["twins.columns: got 4", "5 to 8"]),
        ({"twins": {"columns": 9}}, 8, ["twins.columns: got 9", "5 to 8"]),
        ({"twins": {"replay": 9}}, 3, ["twins.replay: got 9", "of 3 replicas", '"every"']),
        ({"conviction": "proof"}, 1, ['conviction: got "proof"', "one replica"]),
    ],
)
def test_what_cannot_prove_anything_is_refused(block, replicas, said):
    with pytest.raises(ValueError) as caught:
        SentinelConfig.parse({"enabled": True, **block}).convicts_by(Mesh(4, replicas))
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.parametrize(
    ("replicas", "block", "action"),
    [
        (1, {}, "exclude"),
        (2, {}, "quarantine"),
        (3, {"wiring": "static"}, "exclude"),
        (3, {"wiring": "shuffle"}, "exclude"),
        (3, {"action": "halt"}, "halt"),
    ],
)
def test_the_default_action_is_quarantine_where_columns_are_dealt_anew(replicas, block, action):
    assert SentinelConfig.parse({"enabled": True, **block}).of_mesh(Mesh(4, replicas)).action == action


def test_more_clean_columns_than_replicas_cannot_be_asked_for():
    with pytest.raises(ValueError, match="min_clean_columns: got 4, allowed are 1 to 3"):
        SentinelConfig.parse({"enabled": True, "min_clean_columns": 4}).of_mesh(Mesh(4, 3))
