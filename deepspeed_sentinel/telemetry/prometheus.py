"""Numbers for Prometheus: served at ``/metrics``, or written for the node exporter's textfile collector, or both.

Names and units are as Prometheus has them (https://prometheus.io/docs/practices/naming/): one prefix, base units,
_total for what only rises, _info for what stands in labels. docs/monitoring.md lists them, and a test compares.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from deepspeed_sentinel.config import PrometheusConfig
from deepspeed_sentinel.telemetry.numbers import Numbers

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

PREFIX = "deepspeed_sentinel"
_TOTALS = {
    "steps": "Training steps judged since the engine was attached to",
    "judged_messages": "Messages held against the fences",
    "alarms": "Messages outside the fences that were blamed on a worker",
    "disputes": "Disputes between two workers about what crossed a link",
    "excluded_column_steps": "Columns left out of a step, summed over steps",
    "skipped_steps": "Steps in which the optimizer did not step",
}
_WRITE_SECONDS = 1.0  # steps may be far shorter than any scrape interval


class Exporter:
    """Shows the numbers of the last step, until it is closed. Needs the package prometheus_client.

    Args:
        config: where.
        labels: of ``deepspeed_sentinel_run_info``, beside the action.
        clock: in seconds, from any start.

    Raises:
        OSError: the port cannot be listened on, or the file not be written. The text names which.
    """

    def __init__(
        self, config: PrometheusConfig, labels: dict[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        # Only who asks for it needs the package.
        from prometheus_client import CollectorRegistry, start_http_server

        self._config, self._labels, self._clock = config, labels, clock
        self._numbers: Numbers | None = None
        self._written = -_WRITE_SECONDS
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._server: Any = None
        self._write()
        if config.port is not None:
            try:
                self._server, self._thread = start_http_server(config.port, config.address, self._registry)
            except OSError as error:
                raise OSError(f"cannot listen on {config.address}, port {config.port}: {error}") from error

    def show(self, numbers: Numbers) -> None:
        """From now on.

        Raises:
            OSError: the file cannot be written.
        """
        self._numbers = numbers
        if self._clock() - self._written >= _WRITE_SECONDS:
            self._write()

    def close(self) -> None:
        """Serve no more; the file stays, as of the last step.

        Raises:
            OSError: the file cannot be written.
        """
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
        self._write()

    def collect(self) -> Iterator[Metric]:
        """For a registry, from any thread."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        def gauge(name: str, text: str, labels: dict[str, str] | None = None, value: float = 1.0) -> Metric:
            family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=list(labels or {}))
            family.add_metric(list((labels or {}).values()), value)
            return family

        numbers = self._numbers
        if numbers is None:
            return
        run = {**self._labels, "action": numbers.action}
        yield gauge("run_info", "The run that these numbers are of, and by which action it is judged", run)
        for name, text in _TOTALS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=numbers.totals[name])
        yield gauge("last_step", "The engine's global step that was judged last", value=numbers.step)
        yield gauge("last_step_timestamp_seconds", "When it was judged, since 1970", value=numbers.time)
        yield gauge("excluded_columns", "Columns left out of the last step", value=numbers.excluded_columns)
        yield gauge("suspected_workers", "Workers that are to be tried", value=numbers.suspects)
        yield gauge("convicted_workers", "Workers that are convicted", value=len(numbers.convicted))
        score = GaugeMetricFamily(
            f"{PREFIX}_score",
            "Highest score of a stage's messages in the last step; above 1 is an alarm",
            labels=["stage"],
        )
        for stage, value in enumerate(numbers.scores):
            score.add_metric([str(stage)], value)
        yield score
        names = ("stage", "replica", "rank", "local_rank", "host", "device", "gpu")
        convicted = GaugeMetricFamily(
            f"{PREFIX}_convicted_worker_info", "Who is convicted, and where it runs", labels=names
        )
        for place in numbers.convicted:
            said = (getattr(place, name) for name in names)
            convicted.add_metric(["" if one is None else str(one) for one in said], 1.0)
        yield convicted

    def _write(self) -> None:
        if self._config.textfile is None:
            return
        from prometheus_client import write_to_textfile

        self._written = self._clock()
        try:
            write_to_textfile(self._config.textfile, self._registry)  # beside it, then renamed: never half a file
        except OSError as error:
            raise OSError(f"cannot write {self._config.textfile}: {error}") from error
