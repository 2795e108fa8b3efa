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
from deepspeed_sentinel.evidence.table import HARD, NAMES, OF_PAIR, RECEIVED, SENT, TABLE, Evidence
from deepspeed_sentinel.evidence.transfer import Sketches, Transfers
from deepspeed_sentinel.kernels.baseline_distances import DISTANCES
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh
from deepspeed_sentinel.simulation.batched import MessageRows, join_rows, message_rows

_PAIR = int(np.argmax(OF_PAIR))
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
        self._seeds_12 = torch.tensor([[config.seed or 0, config.seed or 0]], dtype=torch.int64)
        self._paper_only = paper_only
        self._baselines = [Baselines(config.activation_decay, config.gradient_decay) for _ in range(mesh.links)]
        self._transfers = [Transfers(config.activation_decay, config.gradient_decay) for _ in range(mesh.stages)]
        self._lessons: dict[tuple[int, int], torch.Tensor] = {}
        self._rows: dict[tuple[int, int], list[MessageRows]] = {}
        self._claims: dict[tuple[int, int, int], list[tuple[np.ndarray, MessageRows]]] = {}

    def begin_step(self) -> None:
        """Forget the messages of the step before."""
        self._rows, self._claims, self._lessons = {}, {}, {}
        self._seeds_12[0, 0] += 1

    def observe(self, direction: int, link: int, crossed_CMBTD: torch.Tensor) -> None:
        """Read what crossed a link: the next micro-batches of all columns."""
        self._rows.setdefault((direction, link), []).append(self._statistics(crossed_CMBTD))

    def claim(self, end: int, direction: int, link: int, mask_CM: torch.Tensor, claimed_CMBTD: torch.Tensor) -> None:
        """Let one end report on ``claimed`` where ``mask``, for the micro-batches observed last."""
        if not mask_CM.any():
            return
        columns, micro_batches = np.nonzero(mask_CM.numpy())
        offset = sum(len(rows.statistics.means_MD) for rows in self._rows[direction, link][:-1]) // self._mesh.replicas
        where = np.stack([columns, micro_batches + offset])
        claimed = claimed_CMBTD[mask_CM.to(claimed_CMBTD.device)]
        self._claims.setdefault((end, direction, link), []).append((where, self._statistics(claimed[:, None])))

    def evidence(self, step: int, served: np.ndarray) -> Evidence:
        """All reports of the step."""
        micro_batches = sum(len(rows.statistics.means_MD) for rows in self._rows[FORWARD, 0]) // self._mesh.replicas
        shape = (2, 2, self._mesh.links, self._mesh.replicas, micro_batches)
        statistics = np.full((*shape, len(TABLE)), np.nan)
        digests = np.zeros(shape, np.int64)
        for (direction, link), rows in self._gathered().items():
            crossed = self._report(direction, link, rows).reshape(*shape[3:], _PAIR)
            statistics[:, direction, link, ..., :_PAIR] = crossed
        for (end, direction, link), claims in self._claims.items():
            for where, rows in claims:
                report = self._report(direction, link, rows)
                at = (end, direction, link, *where)
                # Equal claims have equal digests, so that those who lie alike do not dispute.
                digests[at] = [zlib.crc32(row.tobytes()) for row in report]
                statistics[(*at, slice(_PAIR))] = report
        if not self._paper_only:
            self._add_pairs(statistics, shape[3:])
        if self._paper_only:
            statistics[..., ~_PAPER] = np.nan
        return Evidence(self._mesh, step, statistics, digests, served)

    def learn(self, clean_C: np.ndarray) -> None:
        """Baselines learn from the clean columns of the step, bool [C]."""
        for (direction, link), rows in self._gathered().items():
            baselines = self._baselines[link]
            per_message = torch.cat([rows.statistics.means_MD, rows.statistics.quantiles_MQ], dim=1)
            for (columns, micro_batches), claim in self._claims.get((RECEIVED, direction, link), []):
                at = columns * (len(per_message) // self._mesh.replicas) + micro_batches
                per_message[at] = torch.cat([claim.statistics.means_MD, claim.statistics.quantiles_MQ], dim=1)
            summaries_CV = per_message.view(self._mesh.replicas, -1, per_message.shape[1]).mean(1)
            baselines.learn((direction, SENT), summaries_CV, clean_C)
        for (direction, stage), lessons_CMV in self._lessons.items():
            self._transfers[stage].learn((direction, SENT), lessons_CMV.mean(1), clean_C)

    def _statistics(self, messages_CMBTD: torch.Tensor) -> MessageRows:
        messages_NTD = messages_CMBTD.flatten(0, 1).flatten(1, 2)
        return message_rows(messages_NTD, self._seeds_12.to(messages_NTD.device))

    def _gathered(self) -> dict[tuple[int, int], MessageRows]:
        """Rows of all micro-batches of a link, column by column."""
        return {key: join_rows(parts, self._mesh.replicas) for key, parts in self._rows.items()}

    def _report(self, direction: int, link: int, rows: MessageRows) -> np.ndarray:
        """float64 [N, _PAIR]."""
        distances = self._baselines[link].distances((direction, SENT), rows.statistics)
        return torch.cat([distances, rows.statistics.scalars_M3], dim=1).cpu().numpy().astype(np.float64)

    def _add_pairs(self, statistics: np.ndarray, messages: tuple[int, ...]) -> None:
        """Both neighbours of a stage report on what entered and left it, from sketches that they swapped."""
        sent, received = (self._sketches_by(end, messages) for end in (SENT, RECEIVED))
        for stage in range(1, self._mesh.stages - 1):
            for direction, enters, leaves in ((FORWARD, stage - 1, stage), (BACKWARD, stage, stage - 1)):
                rows, self._lessons[direction, stage] = self._transfers[stage].statistics(
                    (direction, SENT), sent[direction, enters], received[direction, leaves]
                )
                statistics[:, direction, leaves, ..., _PAIR:] = rows.cpu().numpy()

    def _sketches_by(self, end: int, messages: tuple[int, ...]) -> dict[tuple[int, int], Sketches]:
        """What one end of every link sketched, or claims to have: {(direction, link): [C, M, m, ...]}."""
        result = {}
        for (direction, link), rows in self._gathered().items():
            sketch_CMmK = rows.sketches.sketch_XmK.unflatten(0, messages)
            norms_CMm = rows.sketches.norms_Xm.unflatten(0, messages)
            for (columns, micro_batches), claim in self._claims.get((end, direction, link), []):
                sketch_CMmK, norms_CMm = sketch_CMmK.clone(), norms_CMm.clone()
                sketch_CMmK[columns, micro_batches] = claim.sketches.sketch_XmK
                norms_CMm[columns, micro_batches] = claim.sketches.norms_Xm
            result[direction, link] = Sketches(sketch_CMmK, norms_CMm)
        return result


assert (FORWARD, BACKWARD, SENT, RECEIVED) == (0, 1, 0, 1), "they index the arrays of Evidence"
