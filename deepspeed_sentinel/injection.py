"""One entry of ``"inject"``: a fault of a red-team run or drill. Nothing that detects may know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from deepspeed_sentinel.mesh import Mesh


class Injection(BaseModel):
    """One fault of a red-team run or drill. Arguments of the attack stand beside the other keys."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    stage: int = Field(ge=0, description="stage of the worker at fault")
    replica: int = Field(ge=0, description="replica of the worker at fault")
    direction: Literal["forward", "backward"] = Field("forward", description="which message is altered")
    where: Literal["compute", "transit", "report", "sketch"] = Field(
        "compute",
        description="compute: the worker's own result is wrong; transit: altered after its report on what it "
        "sent; report: it lies about what it received; sketch: it lies in its secret sketches alone, of what it "
        "sends and receives",
    )
    attack: str = Field(description="name of an attack, or path/to/file.py:ClassName")
    tensor: int | None = Field(
        None,
        ge=0,
        description="which tensor of the message is altered, counted from 0; of a gradient message among the "
        "gradients. null is the hidden state, the floating-point one of the most features",
    )
    start_step: int = Field(0, ge=0, description="first global step at which it acts")
    stop_step: int | None = Field(None, ge=0, description="first global step at which it no longer acts")
    probability: float = Field(1.0, ge=0.0, le=1.0, description="chance that it acts on a message")

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _possible(self) -> Injection:
        from deepspeed_sentinel.attacks.loading import check_path, files_named

        # A file is code: it runs when somebody means to inject, not where a config is looked at or switched off.
        files = files_named([self.attack, self.arguments])
        for name in files:
            check_path(name)
        if not files:
            self.check_attack()
        if self.stop_step is not None and self.stop_step <= self.start_step:
            raise ValueError(f"stop_step ({self.stop_step}) must be greater than start_step ({self.start_step})")
        return self

    def check_attack(self) -> None:
        """Raise ValueError when the attack cannot be built, or cannot act there; runs the file that it names."""
        # Attacks take torch, and a config without faults is read in a fraction of the time that its import takes.
        from deepspeed_sentinel.attacks import Needs, build_attack

        needs = Needs.of(build_attack(self.attack, self.arguments))
        if needs.simulator_only:
            raise ValueError(
                f"attack {self.attack!r} needs what only the simulator has: a stage's work computed again, its "
                "accumulated gradients, or what other attackers know. Use it there"
            )
        if needs.false_report and self.where != "report":
            raise ValueError(f'attack {self.attack!r} acts on reports only, got where={self.where!r}; use "report"')
        if self.where == "sketch" and (needs.uses_previous or needs.history_steps):
            raise ValueError(
                f"attack {self.attack!r} remembers messages, and where='sketch' alters two kinds of them; choose an "
                "attack without memory"
            )

    def check_mesh(self, mesh: Mesh) -> None:
        """Raise ValueError when the worker is not in ``mesh`` or has no such message there."""
        if self.stage >= mesh.stages or self.replica >= mesh.replicas:
            raise ValueError(
                f"inject: stage {self.stage}, replica {self.replica} is not in the mesh; allowed are stages "
                f"0 to {mesh.stages - 1} and replicas 0 to {mesh.replicas - 1}."
            )
        if self.where == "sketch":
            if not (self.stage >= 2 or self.stage + 2 < mesh.stages):
                raise ValueError(
                    f"inject: stage {self.stage} of {mesh.stages} keeps no secret sketches, because no worker stands "
                    "two stages from it; choose another stage."
                )
            return
        sends_forward = (self.direction == "forward") == (self.where != "report")
        edge = mesh.stages - 1 if sends_forward else 0
        if self.stage == edge:
            verb = "receives" if self.where == "report" else "sends"
            raise ValueError(
                f"inject: stage {self.stage} {verb} no {self.direction} message, so where={self.where!r} with "
                f"direction={self.direction!r} cannot act there; choose another stage or direction."
            )
