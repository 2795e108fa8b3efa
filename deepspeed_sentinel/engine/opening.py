"""The two lines with which a guarded run begins: that it is guarded and what stays unseen, and when judging begins."""

from __future__ import annotations

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.mesh import Mesh

JUDGING = "judging begins: what leaves the fences is an alarm from here on"
_FEW_REPLICAS = {
    1: "1 replica: there is nothing to compare with, so statistics are reported and exclude nothing; what is not "
    "finite, disputed, or should have been passed on unchanged still does",
    2: "2 replicas: there is no majority, so only a replica that changes while the other does not is left out, and "
    "slow drift by one cannot be seen",
}


def guarding(config: SentinelConfig, mesh: Mesh) -> str:
    """What is guarded and how, and what is not seen.

    Args:
        config: the settings in effect.
        mesh: the mesh watched.
    """
    parts = [
        f"guarding {mesh.stages} stages x {mesh.replicas} replicas, action {config.action!r}, wiring "
        f"{config.wiring!r}, conviction by {config.convicts_by(mesh)}",
        f"judging begins after {config.warmup_steps} clean steps",
        *([_FEW_REPLICAS[mesh.replicas]] if mesh.replicas in _FEW_REPLICAS else []),
        _twins(config, mesh),
    ]
    return "; ".join(parts)


def _twins(config: SentinelConfig, mesh: Mesh) -> str:
    """What twin steps there will be, what goes unseen without them, and what they cost."""
    if mesh.replicas < 2:
        return "no twin steps: one replica has no twins"
    lost = 1.0 - 1.0 / mesh.replicas
    unseen = (
        "what no statistic sees (rounding, a small bias, wrong gradients of weights) goes unseen without them: "
        f'"twins": {{"every": 100}} finds it for {lost:.2g} % of the data'
    )
    on_suspicion = "on suspicion alone" if config.tries_suspects else "never"
    if not config.twins.every:
        return f"twin steps {on_suspicion}; {unseen}"
    price = 100 * lost / config.twins.every
    return f"twin steps one in {config.twins.every} at random, which costs {price:.2g} % of the data" + (
        ", and on suspicion" if config.tries_suspects else ""
    )
