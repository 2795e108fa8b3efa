"""What verifiers report on the messages of a simulated step, in the same layout as the engine's evidence.

Statistics are those of ``evidence/``: the same kernels, baselines and table, for all columns of a link at once.

Dimension key: N messages (columns times micro-batches), T tokens, D hidden size, C columns, M micro-batches.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.probe import EndStatistics
from deepspeed_sentinel.evidence.table import HARD, NAMES, RECEIVED, SENT, TABLE, Evidence
from deepspeed_sentinel.kernels.baseline_distances import DISTANCES
from deepspeed_sentinel.kernels.sliced_quantiles import unit_directions
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh
from deepspeed_sentinel.simulation.batched import message_rows

_PAPER = np.array([name in DISTANCES for name in NAMES]) | HARD


class Verifiers:
    """Statistics of one run's messages, and the baselines they are measured against.

    The replicas of a stage share their baselines and both ends of a link agree on them, so one a link suffices.

    Args:
        mesh: the mesh.
        config: decays and seed.
        paper_only: report only the four distances of arXiv 2603.03592 and the non-finite count.
    """

    def __init__(self, mesh: Mesh, config: SentinelConfig, paper_only: bool) -> None:
        self._mesh = mesh
        self._seed = config.seed
        self._paper_only = paper_only
        self._baselines = [Baselines(config.activation_decay, config.gradient_decay) for _ in range(mesh.links)]
        self._directions_DP: torch.Tensor | None = None
        self._rows: dict[tuple[int, int], list[EndStatistics]] = {}
        self._claims: dict[tuple[int, int, int], list[tuple[np.ndarray, EndStatistics]]] = {}

    def begin_step(self) -> None:
        """Forget the messages of the step before."""
        self._rows, self._claims = {}, {}

    def observe(self, direction: int, link: int, crossed_CMBTD: torch.Tensor) -> None:
        """Read what crossed a link: the next micro-batches of all columns."""
        self._rows.setdefault((direction, link), []).append(self._statistics(crossed_CMBTD))

    def claim(self, end: int, direction: int, link: int, mask_CM: torch.Tensor, claimed_CMBTD: torch.Tensor) -> None:
        """Let one end report on ``claimed`` where ``mask``, for the micro-batches observed last."""
        if not mask_CM.any():
            return
        columns, micro_batches = np.nonzero(mask_CM.numpy())
        offset = sum(rows.means_MD.shape[0] for rows in self._rows[direction, link][:-1]) // self._mesh.replicas
        where = np.stack([columns, micro_batches + offset])
        claimed = claimed_CMBTD[mask_CM.to(claimed_CMBTD.device)]
        self._claims.setdefault((end, direction, link), []).append((where, self._statistics(claimed[:, None])))

    def evidence(self, step: int, served: np.ndarray) -> Evidence:
        """All reports of the step."""
        micro_batches = sum(rows.means_MD.shape[0] for rows in self._rows[FORWARD, 0]) // self._mesh.replicas
        shape = (2, 2, self._mesh.links, self._mesh.replicas, micro_batches)
        statistics = np.empty((*shape, len(TABLE)))
        digests = np.zeros(shape, np.int64)
        for (direction, link), rows in self._gathered().items():
            crossed = self._report(direction, link, rows).reshape(*shape[3:], len(TABLE))
            statistics[:, direction, link] = crossed
        for (end, direction, link), claims in self._claims.items():
            for where, rows in claims:
                report = self._report(direction, link, rows)
                at = (end, direction, link, *where)
                # Equal claims have equal digests, so that those who lie alike do not dispute.
                digests[at] = [zlib.crc32(row.tobytes()) for row in report]
                statistics[at] = report
        if self._paper_only:
            statistics[..., ~_PAPER] = np.nan
        return Evidence(self._mesh, step, statistics, digests, served)

    def learn(self, clean_C: np.ndarray) -> None:
        """Baselines learn from the clean columns of the step, bool [C]."""
        for (direction, link), rows in self._gathered().items():
            baselines = self._baselines[link]
            per_message = torch.cat([rows.means_MD, rows.quantiles_MQ], dim=1)
            for (columns, micro_batches), claim in self._claims.get((RECEIVED, direction, link), []):
                at = columns * (len(per_message) // self._mesh.replicas) + micro_batches
                per_message[at] = torch.cat([claim.means_MD, claim.quantiles_MQ], dim=1)
            summaries_CV = per_message.view(self._mesh.replicas, -1, per_message.shape[1]).mean(1)
            baselines.learn((direction, SENT), summaries_CV, clean_C)

    def _statistics(self, messages_CMBTD: torch.Tensor) -> EndStatistics:
        messages_NTD = messages_CMBTD.flatten(0, 1).flatten(1, 2)
        if self._directions_DP is None:
            self._directions_DP = unit_directions(messages_NTD.shape[-1], self._seed, messages_NTD.device)
        return message_rows(messages_NTD, self._directions_DP)

    def _gathered(self) -> dict[tuple[int, int], EndStatistics]:
        """Rows of all micro-batches of a link, column by column."""
        return {key: _join(parts, self._mesh.replicas) for key, parts in self._rows.items()}

    def _report(self, direction: int, link: int, rows: EndStatistics) -> np.ndarray:
        """float64 [N, len(TABLE)]."""
        distances = self._baselines[link].distances((direction, SENT), rows)
        return torch.cat([distances, rows.scalars_M3], dim=1).cpu().numpy().astype(np.float64)


def _join(parts: list[EndStatistics], columns: int) -> EndStatistics:
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> torch.Tensor:
        pieces = [getattr(part, name) for part in parts]
        by_column = [piece.view(columns, -1, piece.shape[1]) for piece in pieces]
        return torch.cat(by_column, dim=1).flatten(0, 1)

    return EndStatistics(joined("means_MD"), joined("quantiles_MQ"), joined("scalars_M3"), joined("digest_M2"))


assert (FORWARD, BACKWARD, SENT, RECEIVED) == (0, 1, 0, 1), "they index the arrays of Evidence"
