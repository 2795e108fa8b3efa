"""A conviction in the form that health agents take: NVSentinel's HealthEvent, in proto3's JSON.

Fields and values are those of https://github.com/NVIDIA/NVSentinel, data-models/protobufs/health_event.proto; whoever
runs an agent of another kind finds the same under the same names. Nothing here sends anything.
"""

from __future__ import annotations

import time
from typing import Any

from deepspeed_sentinel.telemetry.devices import Device
from deepspeed_sentinel.telemetry.events import Conviction
from deepspeed_sentinel.telemetry.who import Place

AGENT, CHECK = "deepspeed-sentinel", "SentinelConviction"
_VERSION = 1


def health_event(
    conviction: Conviction, place: Place, device: Device, step: int, now: float, run_id: str, injected: bool = False
) -> dict[str, Any]:
    """The record of one conviction.

    ``isFatal``, on which agents cordon a node, is true only of what was proved, and of nothing in a drill, which asks
    for no action either. There is never one with ``isHealthy``:
    that a worker did nothing more for some steps says little of its device.

    Args:
        conviction: of whom, and why.
        place, device: where that worker runs.
        step: in which it was convicted.
        now: seconds since 1970.
        run_id: of the run.
        injected: faults are injected on purpose.
    """
    entities = [
        *([{"entityType": "GPU_UUID", "entityValue": place.gpu}] if place.gpu else []),
        # Torch tells the domain in eight digits, agents in four.
        *([{"entityType": "PCI", "entityValue": device.pci.removeprefix("0000")}] if device.pci else []),
    ]
    metadata = {"run_id": run_id, "step": step, "stage": place.stage, "replica": place.replica, "rank": place.rank}
    metadata |= {"proved": str(conviction.proved).lower(), "injected": str(injected).lower()}
    action = "NONE" if injected else "RUN_DCGMEUD" if device.on_gpu else "CONTACT_SUPPORT"
    purpose = "DRILL, faults were injected on purpose: " if injected else ""
    return {
        "version": _VERSION,
        "agent": AGENT,
        "componentClass": "GPU" if device.on_gpu else "CPU",
        "checkName": CHECK,
        "isFatal": conviction.proved and not injected,
        "isHealthy": False,
        "message": f"{purpose}{place} convicted in step {step}: {conviction.why}",
        "recommendedAction": action,
        "errorCode": ["SENTINEL_PROVED" if conviction.proved else "SENTINEL_STRIKES"],
        "entitiesImpacted": entities,
        "metadata": {name: str(value) for name, value in metadata.items()},
        "generatedTimestamp": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z",
        "nodeName": place.host or "",
    }
