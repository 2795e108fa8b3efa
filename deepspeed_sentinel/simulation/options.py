"""Everything that describes one simulated run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from deepspeed_sentinel.attacks import Needs, build_attack
from deepspeed_sentinel.mesh import DIRECTIONS, Mesh
from deepspeed_sentinel.simulation.sizes import SIZES, Size

_CHOICES = {
    "direction": (*DIRECTIONS, "both"),
    "model": tuple(SIZES),
    "verifier": ("trusted", "receiver"),
    "evidence": ("paper", "all"),
    "guard": ("on", "off"),
    "procedure": ("ours", "paper"),
    "dtype": ("float32", "bfloat16"),
    "wiring": (None, "heal", "static", "shuffle"),
    "change": ("none", "kinds", "crossing", "spells", "turn", "spike", "spikes", "rate", "sequence"),
}


@dataclass(frozen=True)
class SimulationOptions:
    """Settings of a run; the command line's options have the same names.

    Attributes:
        stages, replicas: the mesh; the first and the last stage are trusted.
        malicious: share of the workers of each middle stage that tamper, at least one where it is above zero.
        attackers: [stage, replica] of each, in place of drawing that share.
        attack, attack_arguments: what they do; None is nobody tampers.
        direction: which messages they tamper with.
        steps, start: steps of training; the first step in which the attack may act.
        seed: of weights, data, wirings, attackers and attack.
        model, moe: size of the Llama; with a mixture of experts in place of each MLP.
        micro_batches, micro_batch_size, sequence: of each column; 0 is the default of the model's size.
        verifier: who computes the statistics that are judged: a trusted verifier on every link, as in
            arXiv 2603.03592, or the receiver, which may lie, held against the sender's report.
        evidence: all statistics of the table, or the four distances of the paper alone.
        guard: off lets the attack through.
        procedure: how to judge: this package's way, or that of arXiv 2603.03592 (``simulation/paper.py``), which
            looks at the messages of ``direction`` alone.
        honest_steps: with procedure="paper" the steps whose messages it takes for honest before it flags any.
        stop_after: end a run so many steps after all who tamper are convicted; 0 runs all steps.
        majority: allow half of a stage's workers or more to be malicious.
        chunk: micro-batches of all columns that are computed at once; 0 is all.
        device, dtype: where and in what to compute.
        wiring: how columns are dealt, in place of what ``sentinel`` says of it. With "shuffle" workers that meet for
            the first time know what others have learnt of the stage between them, as they would not in an engine.
        change, change_at: an honest change and its first step. kinds: each column has its own kind of text from the
            very first step; crossing: one column after the other crosses to another kind for good; spells: columns
            have now and then some steps of another kind; turn: all cross at once; spike: one column has a batch of
            noise in one step of ten; spikes: all have; rate: the learning rate grows by a factor of five; sequence:
            sequences double in length, up to ``sequence``.
        twins_every: one step in so many, at random, is a twin step; 0 leaves them to suspicion alone.
        sentinel: settings of the ``"sentinel"`` block that judgement is to use.
    """

    stages: int = 8
    replicas: int = 8
    malicious: float = 0.25
    attackers: tuple[tuple[int, int], ...] = ()
    attack: str | None = None
    attack_arguments: dict[str, Any] = field(default_factory=dict)
    direction: str = "both"
    steps: int = 300
    start: int = 100
    seed: int = 0
    model: str = "tiny"
    moe: bool = False
    micro_batches: int = 0
    micro_batch_size: int = 0
    sequence: int = 0
    verifier: str = "trusted"
    evidence: str = "all"
    guard: str = "on"
    procedure: str = "ours"
    honest_steps: int = 1000
    stop_after: int = 0
    majority: bool = False
    chunk: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    wiring: str | None = None
    change: str = "none"
    change_at: int = 40
    twins_every: int = 0
    sentinel: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                named = ", ".join(choice for choice in allowed if choice)
                raise ValueError(f"{name} must be one of {named}, got {getattr(self, name)!r}")
        lowest = {"stages": 3, "replicas": 1, "steps": 1, "honest_steps": 1}
        at_zero = dict.fromkeys(("start", "seed", "chunk", "stop_after", "change_at", "twins_every"), 0)
        for name, low in {**lowest, **at_zero}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be a whole number from {low}, got {value!r}")
        for name in ("micro_batches", "micro_batch_size", "sequence"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number from 1, or 0 for the default, got {value!r}")
            if value == 0:
                object.__setattr__(self, name, getattr(self.size, name))
        self._check_attack()

    def _check_attack(self) -> None:
        if not 0.0 <= self.malicious <= 1.0:
            raise ValueError(f"malicious must be a share from 0 to 1, got {self.malicious!r}")
        object.__setattr__(self, "attackers", tuple(tuple(worker) for worker in self.attackers))
        for worker in self.attackers:
            if len(worker) != 2 or not 0 < worker[0] < self.stages - 1 or not 0 <= worker[1] < self.replicas:
                raise ValueError(
                    f"attackers must be [stage, replica] with stages from 1 to {self.stages - 2} and replicas from 0 "
                    f"to {self.replicas - 1}, got {list(worker)}"
                )
        if 2 * self.attackers_per_stage >= self.replicas and self.attackers_per_stage and not self.majority:
            raise ValueError(
                f"malicious={self.malicious} makes {self.attackers_per_stage} of {self.replicas} workers of a stage "
                "malicious; fewer than half is what any majority can bear. Ask for --majority to do it all the same"
            )
        if self.attack is None:
            return
        if self.start >= self.steps and (self.attackers_per_stage or self.attackers):
            raise ValueError(f"start ({self.start}) must be less than steps ({self.steps}), or nobody ever attacks")
        if self.procedure == "paper" and self.guard == "on" and self.start < self.honest_steps:
            raise ValueError(
                f"start ({self.start}) must not be below honest_steps ({self.honest_steps}) with procedure='paper': it "
                "takes these steps for honest"
            )
        needs = Needs.of(build_attack(self.attack, self.attack_arguments))
        if needs.false_report and self.verifier == "trusted":
            raise ValueError(
                f"attack {self.attack!r} acts on what receivers report, which verifier='trusted' does not ask for; "
                "use verifier='receiver'"
            )

    @property
    def size(self) -> Size:
        return SIZES[self.model]

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.stages, self.replicas)

    @property
    def directions(self) -> tuple[bool, bool]:
        """Whether ``direction`` holds activations, and whether gradients."""
        return self.direction != "backward", self.direction != "forward"

    @property
    def attackers_per_stage(self) -> int:
        """How many are drawn of each middle stage."""
        if self.attackers or self.malicious == 0:
            return 0
        return max(1, round(self.malicious * self.replicas))

    def honest(self) -> SimulationOptions:
        """The same training without attack and guard: what all runs of these settings are compared with."""
        changes: dict[str, Any] = {
            "attack": None,
            "attack_arguments": {},
            "malicious": 0.0,
            "direction": "both",
            "start": 0,
            "verifier": "trusted",
            "evidence": "all",
            "guard": "off",
            "procedure": "ours",
            "honest_steps": 1000,
            "stop_after": 0,
            "majority": False,
            "wiring": None,
            "twins_every": 0,
            "sentinel": {},
        }
        return dataclasses.replace(self, **changes)

    def key(self) -> str:
        """One text for one run: equal settings, equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def trunk_of(options: SimulationOptions) -> SimulationOptions:
    """What a run has in common with others up to ``start``: equal for runs that may share these steps."""
    nobody: dict[str, Any] = {
        "attack": None,
        "attack_arguments": {},
        "malicious": 0.0,
        "attackers": (),
        "majority": False,
        "stop_after": 0,
    }
    # The paper's procedure flags nothing before its honest steps are over, and messages of ``direction`` alone then.
    if options.procedure == "ours" or options.start <= options.honest_steps:
        nobody["direction"] = "both"
    return dataclasses.replace(options, **nobody)
