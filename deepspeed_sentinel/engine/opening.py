"""The two lines with which a watched run begins: what is done and what stays unseen, and when judging begins."""

from __future__ import annotations

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.mesh import Mesh

JUDGING = "judging begins: what leaves the fences is an alarm from here on"
_OBSERVES = ": what is found is reported, nothing is kept out of the weights and no run is stopped"
_FEW_REPLICAS = {
    1: "1 replica: there is nothing to compare with, so statistics are reported and count against nobody; what is not "
    "finite, disputed, or should have been passed on unchanged does",
    2: "2 replicas: there is no majority, so only a replica that changes while the other does not is blamed, and "
    "slow drift by one cannot be seen",
}


def opening(config: SentinelConfig, mesh: Mesh) -> str:
    """What is guarded, or only watched, and how, and what is not seen.

    Args:
        config: the settings in effect.
        mesh: the mesh watched.
    """
    observes = config.action == "observe"
    parts = [
        f"{'watching' if observes else 'guarding'} {mesh.stages} stages x {mesh.replicas} replicas, action "
        f"{config.action!r}{_OBSERVES if observes else ''}, wiring {config.wiring!r}, conviction by "
        f"{config.convicts_by(mesh)}",
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
