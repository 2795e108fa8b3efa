"""The ``"sentinel"`` block of a DeepSpeed config: one strict model whose defaults need no tuning."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepspeed_sentinel.injection import Injection

if TYPE_CHECKING:
    from deepspeed_sentinel.mesh import Mesh

BLOCK = "sentinel"
Action = Literal["observe", "exclude", "quarantine", "halt"]
ACTIONS: tuple[Action, ...] = get_args(Action)


class TwinsConfig(BaseModel):
    """Steps in which all columns are given the same micro-batches, so that honest workers of a stage send the same."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    on_suspicion: bool = Field(
        True,
        description='while somebody is suspected, each step is a twin step with probability a half; with "action": '
        '"observe" none is',
    )
    every: int = Field(
        0, ge=0, description="one step in so many, at random, is a twin step, also without suspicion; 0 is none"
    )
    replay: int = Field(
        0,
        ge=0,
        description="with one or two replicas: one step in so many, at random, is computed twice and compared with "
        "itself; 0 is none",
    )
    columns: Literal["all"] | int = Field(
        "all",
        description="how many columns are given the same, drawn anew each time, the others being left out of that "
        "step; fewer than all where replicas of a stage may compare what they are given",
    )


class PrometheusConfig(BaseModel):
    """Numbers for Prometheus, from rank 0 alone; see docs/monitoring.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    address: str = Field(
        "127.0.0.1", min_length=1, description="of rank 0's host, to serve /metrics at; others reach it at 0.0.0.0"
    )
    port: int | None = Field(None, ge=1, le=65535, description="to serve /metrics at; null serves nothing")
    textfile: str | None = Field(
        None,
        pattern=r"\.prom$",
        description="file for the textfile collector of the node exporter, which reads *.prom; null writes none",
    )

    @property
    def wanted(self) -> bool:
        return self.port is not None or self.textfile is not None

    @model_validator(mode="after")
    def _possible(self) -> PrometheusConfig:
        if self.wanted and importlib.util.find_spec("prometheus_client") is None:
            raise ValueError(
                "port and textfile need the package prometheus_client, which is not installed: "
                "pip install '.[prometheus]' in a clone, or pip install prometheus_client"
            )
        return self


class SentinelConfig(BaseModel):
    """Everything that can be set in ``"sentinel": {...}``. ``{"enabled": true}`` is enough."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enabled: bool = Field(False, description="switch; false leaves the engine untouched")
    action: Action | None = Field(
        None,
        description="observe: report only; exclude: leave an alarmed column out of this step; quarantine: also "
        "leave a convicted worker's column out until its probation ends; halt: exclude, and stop all ranks with "
        "a checkpoint at the first conviction or lasting dispute; null is quarantine where columns are dealt anew "
        '("wiring": "heal") and there are two replicas or more, else exclude',
    )
    wiring: Literal["heal", "static", "shuffle"] = Field(
        "heal",
        description="which replica of each stage serves which column. heal: moved where somebody is suspected or "
        "convicted, so that bad workers share few columns; static: never; shuffle: drawn anew, and then as heal",
    )
    shuffle_every: int = Field(1, ge=1, description='steps from one draw to the next with "wiring": "shuffle"')
    min_clean_columns: int = Field(
        1,
        ge=1,
        description="columns without a convicted worker below which training stops with a checkpoint; there are as "
        "many as replicas without the convicted of the stage that has most of them",
    )
    warmup_steps: int = Field(
        20, ge=2, description="clean steps the fences learn from before statistics can raise an alarm"
    )
    activation_decay: float = Field(0.9, gt=0.0, lt=1.0, description="EMA decay of activation baselines")
    gradient_decay: float = Field(0.8, gt=0.0, lt=1.0, description="EMA decay of gradient baselines")
    fence_window: int = Field(64, ge=8, le=4096, description="recent clean steps the fences are built from")
    fence_multiplier: float = Field(
        3.0, ge=1.0, description="smallest distance of a fence from the quartiles, in inter-quartile ranges"
    )
    target_false_positive_rate: float = Field(
        0.005, gt=0.0, lt=0.1, description="share of clean messages that may be alarms; widens the fences"
    )
    conviction: Literal["proof", "statistics"] | None = Field(
        None,
        description="what convicts: proof in a twin step, or strikes, and then nobody is tried on suspicion; null is "
        "proof with three replicas and more, if there are twin steps at all, and strikes with fewer",
    )
    twins: TwinsConfig = Field(
        default_factory=lambda: TwinsConfig.model_validate({}),
        description="twin steps: all columns are given the same micro-batches",
        examples=[{"every": 100}],
    )
    strikes: int = Field(3, ge=1, description="strikes that convict a worker, where strikes do")
    strike_window: int = Field(20, ge=1, description="steps within which those strikes must fall")
    probation_steps: int = Field(
        200, ge=1, description="steps without a strike after which a conviction is lifted, on probation"
    )
    max_skipped_steps: int = Field(
        10, ge=1, description="successive steps without any column left after which training stops"
    )
    weights_every: int = Field(
        50,
        ge=0,
        description="steps from one comparison of the replicas' weights to the next, the first one after a load "
        "aside; 0 makes none",
    )
    heartbeat_timeout: float = Field(
        120.0,
        ge=5.0,
        description="seconds without a heartbeat after which a rank is given up, if all others wait for it",
    )
    output_dir: str = Field(
        "sentinel_logs",
        min_length=1,
        description="folder of what is written down: events, exclusions, the ledger of devices",
    )
    events: Literal["none", "alarms", "steps"] = Field(
        "alarms", description="what events.jsonl holds; steps adds one line a step with every worker's score"
    )
    prometheus: PrometheusConfig = Field(
        default_factory=lambda: PrometheusConfig.model_validate({}),
        description="numbers for Prometheus; none without a port or a text file",
        examples=[{"port": 9400}],
    )
    seed: int | None = Field(
        None,
        ge=0,
        description="null draws the secrets of the sketches from the operating system; a number makes runs repeat "
        "exactly, and lets everybody who reads it foresee which tokens are looked at",
    )
    inject: tuple[Injection, ...] = Field(
        (),
        strict=False,
        description="faults to inject: for red-team runs and drills only",
        examples=[[{"stage": 1, "replica": 2, "attack": "scaling"}]],
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_from_json(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("inject"), list):
            return {**values, "inject": tuple(values["inject"])}
        return values

    @model_validator(mode="after")
    def _possible(self) -> SentinelConfig:
        if self.strikes > self.strike_window:
            raise ValueError(
                f"strikes ({self.strikes}) must not exceed strike_window ({self.strike_window}): a step gives a "
                "worker one strike at most"
            )
        if self.warmup_steps > self.fence_window:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must not exceed fence_window ({self.fence_window}): older "
                "steps would be forgotten before they are used"
            )
        return self

    def of_mesh(self, mesh: Mesh) -> SentinelConfig:
        """The settings as they take effect in this mesh: whoever only observes moves nobody.

        Raises:
            ValueError: ``min_clean_columns`` exceeds the replicas.
        """
        if self.min_clean_columns > mesh.replicas:
            raise ValueError(
                f"{BLOCK}.min_clean_columns: got {self.min_clean_columns}, allowed are 1 to {mesh.replicas}, the "
                "number of replicas."
            )
        wiring = "static" if mesh.replicas == 1 or (self.wiring, self.action) == ("heal", "observe") else self.wiring
        action = self.action or ("quarantine" if wiring == "heal" else "exclude")
        return self.model_copy(update={"action": action, "wiring": wiring})

    def with_action(self, action: str, mesh: Mesh) -> SentinelConfig:
        """The settings as they take effect in this mesh with another action, as if the block had it.

        Raises:
            ValueError: there is no such action, or the block could not have it.
        """
        if action not in ACTIONS:
            raise ValueError(f"{BLOCK}.action: got {action!r}, allowed are {', '.join(map(repr, ACTIONS))}.")
        # Files of attacks are not looked at again: a script may stand in another folder by now.
        block = {**self.model_dump(exclude={"inject"}), "action": action}
        return SentinelConfig.parse(block).model_copy(update={"inject": self.inject}).of_mesh(mesh)

    @property
    def tries_suspects(self) -> bool:
        """Whether there are twin steps on suspicion.

        Who only observes trains on the data that it was given, and where statistics are to convict nobody is tried.
        """
        return self.twins.on_suspicion and self.action != "observe" and self.conviction != "statistics"

    def convicts_by(self, mesh: Mesh) -> Literal["proof", "statistics"]:
        """What convicts in this mesh.

        Raises:
            ValueError: there are too few replicas, or too few columns in a twin step, to prove anything.
        """
        columns = mesh.replicas if self.twins.columns == "all" else self.twins.columns
        least = (mesh.replicas - 1) // 2 + 2
        if mesh.replicas > 2 and not least <= columns <= mesh.replicas:
            raise ValueError(
                f"{BLOCK}.twins.columns: got {columns}, and of {mesh.replicas} replicas {least} to {mesh.replicas} or "
                '"all" can prove something: fewer than half of a stage may be bad, and one more must agree.'
            )
        if self.twins.replay and mesh.replicas > 2:
            raise ValueError(
                f"{BLOCK}.twins.replay: got {self.twins.replay}, and of {mesh.replicas} replicas each is the others' "
                'twin: allowed is 0; set "every" instead, which computes nothing twice.'
            )
        if self.conviction == "proof" and mesh.replicas < 2:
            raise ValueError(
                f'{BLOCK}.conviction: got "proof", and with one replica there is nothing to compare a worker with. '
                'Allowed here is "statistics".'
            )
        able = mesh.replicas > 2 and (self.tries_suspects or self.twins.every > 0)
        return self.conviction or ("proof" if able else "statistics")

    @classmethod
    def parse(cls, block: Any) -> SentinelConfig:
        """Validate a config block.

        Raises:
            ValueError: one line per mistake with its key, the value got and what is allowed.
        """
        if isinstance(block, cls):
            return block
        if not isinstance(block, Mapping):
            raise ValueError(f'"{BLOCK}" must be an object such as {{"enabled": true}}, got {_json(block)}.')
        try:
            return cls.model_validate(dict(block))
        except ValidationError as error:
            raise ValueError(_explain(error, cls)) from None


def _fields(model: type[BaseModel], where: tuple[int | str, ...]) -> Iterable[str]:
    """Keys of the block, or of the one in it that the names lead to."""
    for name in where:
        inner = model.model_fields[name].annotation if name in model.model_fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return model.model_fields


# Pydantic's names of them, whose own texts show classes of ours.
_SHAPES = {"model_type": "an object", "tuple_type": "a list"}


def _example(model: type[BaseModel], where: tuple[int | str, ...]) -> Any:
    """Of the value that stands there; an entry of a list is its example's first."""
    name, *entry = where
    (example,) = model.model_fields[str(name)].examples or [None]
    return example[0] if entry else example


def _json(value: Any) -> str:
    """A value as the config has it; what JSON cannot hold as Python shows it."""
    return json.dumps(value, default=repr, ensure_ascii=False)


def _by_value(error: ValidationError) -> Iterable[dict[str, Any]]:
    """Its mistakes, of which pydantic tells one for each kind that a value may be of, as one of each value."""
    found: dict[tuple[int | str, ...], dict[str, Any]] = {}
    for each in error.errors(include_url=False):
        mistake: dict[str, Any] = {**each}
        if mistake["loc"][-1:] == ("int",) or "literal[" in str(mistake["loc"][-1:]):
            mistake["loc"] = mistake["loc"][:-1]
        first = found.setdefault(mistake["loc"], mistake)
        if first is not mistake:
            first["msg"] += mistake["msg"].replace("Input should be", " or")
    return found.values()


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    lines = [f'Invalid "{BLOCK}" block in the DeepSpeed config:']
    for mistake in _by_value(error):
        key = ".".join(str(part) for part in (BLOCK, *mistake["loc"]))
        if mistake["type"] == "extra_forbidden":
            allowed = list(_fields(model, mistake["loc"][:-1]))
            near = difflib.get_close_matches(str(mistake["loc"][-1]), allowed, n=1)
            which = f'did you mean "{near[0]}"?' if near else f"allowed: {', '.join(allowed)}"
            lines.append(f"  {key}: unknown key (value {_json(mistake['input'])}); {which}")
        elif mistake["type"] in _SHAPES:
            such = f"must be {_SHAPES[mistake['type']]} such as {_json(_example(model, mistake['loc']))}"
            lines.append(f"  {key}: got {_json(mistake['input'])}; {such}")
        elif mistake["type"] == "value_error":
            lines.append(f"  {key}: {mistake['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"  {key}: got {_json(mistake['input'])}; {mistake['msg']}")
    return "\n".join(lines)
