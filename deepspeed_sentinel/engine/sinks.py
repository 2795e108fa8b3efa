"""Where the numbers of each step go on rank 0: to DeepSpeed's monitor, where it is on, and to Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.engine.voice import opened
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.judgement.verdict import Verdict
from deepspeed_sentinel.telemetry.numbers import Numbers, monitor_events
from deepspeed_sentinel.telemetry.prometheus import Exporter
from deepspeed_sentinel.telemetry.who import Who

_Sink = Callable[[Numbers], None]


class Sinks:
    """Numbers of this run, from rank 0; on other ranks nothing. Collective to create.

    Args:
        engine: whose monitor; its ``global_samples`` are the other axis there, as in DeepSpeed's own curves.
        config: whose ``prometheus`` says where else.
        control: gathers of all ranks.
        who: names the workers.
        labels: of the run, for Prometheus.
        note: says a line.

    Raises:
        ValueError: on every rank, when rank 0 cannot listen on the port, or write the file.
    """

    def __init__(
        self,
        engine: PipelineEngine,
        config: SentinelConfig,
        control: Control,
        who: Who,
        labels: Mapping[str, str],
        note: Callable[[str], None],
    ) -> None:
        self._engine, self._who, self._note = engine, who, note
        first = dist.get_rank() == 0
        wanted = first and config.prometheus.wanted
        # Only rank 0 listens, but all ranks must fail together when it cannot.
        self._exporter, problem = opened(
            control, partial(Exporter, config.prometheus, dict(labels)) if wanted else None
        )
        if problem:
            raise ValueError(f"sentinel.prometheus: {problem}. Name a free port, or a file that rank 0 can write.")
        self._steps = 0
        self._sinks: dict[str, _Sink] = {}
        if first and engine.monitor.enabled:
            self._sinks["DeepSpeed's monitor"] = self._to_monitor
        if self._exporter:
            self._sinks["Prometheus"] = self._exporter.show

    def step(self, verdict: Verdict, counts: Mapping[str, int]) -> None:
        """Send what a step came to.

        Args:
            verdict: of the step, after the engine has counted its samples.
            counts: see ``Gate``.
        """
        self._steps += 1
        if not self._sinks:
            return
        numbers = Numbers.of(verdict, {"steps": self._steps, **counts}, self._who, time.time())
        for name, sink in list(self._sinks.items()):
            try:
                sink(numbers)
            except Exception as error:  # other people's code, and no reason to end a run
                del self._sinks[name]
                self._note(f"{name} gets no numbers of Sentinel any more: {error}")

    def close(self) -> None:
        """Nothing comes any more."""
        self._sinks.clear()
        if self._exporter:
            try:
                self._exporter.close()
            except OSError as error:
                self._note(f"Prometheus: {error}")

    def _to_monitor(self, numbers: Numbers) -> None:
        self._engine.monitor.write_events(monitor_events(numbers, self._engine.global_samples))
