"""What verifiers report on the messages of a simulated step, in the same layout as the engine's evidence.

Statistics are those of ``evidence/``: the same kernels' definitions, baselines, transfers and table, for all columns
of a link at once. ``evidence/collector.py`` does the same for one worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_sentinel.evidence.baseline import Baselines
from deepspeed_sentinel.evidence.renewal import of_senders
from deepspeed_sentinel.evidence.step import Evidence, Twins
from deepspeed_sentinel.evidence.table import BY_JUDGE, HARD, NAMES, OF_PAIR, RECEIVED, SENT, TABLE
from deepspeed_sentinel.evidence.transfer import NEXT, Known, Transfers, lessons, pair_rows
from deepspeed_sentinel.kernels.baseline_distances import DISTANCES
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh
from deepspeed_sentinel.simulation.observation import Looks, Observation, Observer, join

_PAPER = np.array([name in DISTANCES for name in NAMES]) | HARD
_OWN = ~(OF_PAIR | BY_JUDGE)


@dataclass(frozen=True)
class _Lesson:
    """What one link's messages of the step teach.

    Attributes:
        summaries_CV: for its baseline.
        lessons_CV: on its senders' stage, in each column's lasting projection; None of first and last stage.
        ahead_CV: the same in the next ones, zeros where no renewal is near; None where that is everywhere.
    """

    summaries_CV: torch.Tensor
    lessons_CV: torch.Tensor | None
    ahead_CV: torch.Tensor | None


class Verifiers:
    """Statistics of one run's messages, and what they are measured against.

    The replicas of a stage share their baselines and both ends of a link agree on them, so one a link suffices, and
    one set of transfers a stage.

    Args:
        mesh: the mesh.
        decays: EMA decays of activations and gradients.
        seed: of the secrets of the sketches.
        paper_only: report only the four distances of arXiv 2603.03592 and the non-finite count.
    """

    def __init__(self, mesh: Mesh, decays: tuple[float, float], seed: int, paper_only: bool) -> None:
        self._mesh = mesh
        self._paper_only = paper_only
        self._observer = Observer(mesh, seed, pairs=not paper_only)
        self._baselines = [Baselines(*decays) for _ in range(mesh.links)]
        self._transfers = [Transfers(*decays) for _ in range(mesh.stages)]
        self._observed: dict[tuple[int, int], list[Observation]] = {}
        self._lessons: dict[tuple[int, int], _Lesson] = {}

    def begin_step(self, step: int, met: np.ndarray | None = None, twins: bool = False) -> None:
        """Forget the messages of the step before.

        Args:
            step: the engine's global step.
            met: bool [S, C], pairs whose two workers beside the stage share no secret yet; None is none.
            twins: it is a twin step, so messages are digested under keys.
        """
        self._observed, self._lessons = {}, {}
        self._observer.begin_step(step, keyed=twins)
        if met is not None and met.any():
            self._observer.renewal.forget(met)
            for stage, transfers in enumerate(self._transfers):
                for direction in (FORWARD, BACKWARD):
                    transfers.renew((direction, RECEIVED), np.zeros_like(met[stage]), met[stage])

    def observe(
        self, direction: int, link: int, sent_CMBTD: torch.Tensor, received_CMBTD: torch.Tensor | None = None
    ) -> None:
        """Read what crossed a link: the next micro-batches of all columns.

        Args:
            direction, link: which link.
            sent_CMBTD: what its senders report on.
            received_CMBTD: what its receivers report on, where that is something else.
        """
        received = sent_CMBTD if received_CMBTD is None else received_CMBTD
        observation = self._observer.observe(direction, link, sent_CMBTD, received)
        self._observed.setdefault((direction, link), []).append(observation)

    def evidence(self, step: int, served: np.ndarray, twins: Twins | None = None) -> Evidence:
        """All reports of the step, in this wiring (int64 [S, C]); ``twins`` if it is a twin step."""
        observed = {key: join(parts, self._mesh.replicas) for key, parts in self._observed.items()}
        messages = observed[FORWARD, 0].of_end[RECEIVED].means_MD.shape[0]
        shape = (2, 2, self._mesh.links, self._mesh.replicas, messages // self._mesh.replicas)
        statistics = np.full((*shape, len(TABLE)), np.nan)
        digests, keyed = np.zeros((*shape, 1), np.int64), np.zeros(shape[1:], np.int64)
        for (direction, link), observation in observed.items():
            for end in (SENT, RECEIVED):
                rows = observation.of_end[end]
                own = torch.cat([self._baselines[link].distances((direction, end), rows), rows.scalars_M3], dim=1)
                statistics[end, direction, link][..., _OWN] = self._numbers(own)
                digests[end, direction, link] = self._numbers(observation.digests[end]).view(np.int64)
            keyed[direction, link] = self._numbers(observation.keyed[:, None])[..., 0]
            lesson = ahead = None
            entered = observed.get((direction, link + (-1 if direction == FORWARD else 1)))
            if observation.leaving is not None and entered is not None:
                assert entered.entering is not None
                pair, lesson, ahead = self._look_at_pair(direction, link, entered.entering, observation.leaving)
                # Both neighbours of the sender hold the same two sketches.
                statistics[:, direction, link][..., OF_PAIR] = pair
            rows = observation.of_end[RECEIVED]
            summaries = self._by_column(torch.cat([rows.means_MD, rows.quantiles_MQ], dim=1))
            self._lessons[direction, link] = _Lesson(summaries, lesson, ahead)
        if self._paper_only:
            statistics[..., ~_PAPER] = np.nan
        renewed = self._observer.renewal.new_X
        return Evidence(self._mesh, step, statistics, digests, served, renewed, twins, keyed=keyed)

    def learn(self, clean: np.ndarray) -> None:
        """Learn from the clean messages of the step whose evidence was taken last, bool [2, L, C]."""
        for (direction, link), lesson in self._lessons.items():
            clean_C = clean[direction, link].copy()
            for end in (SENT, RECEIVED):
                self._baselines[link].learn((direction, end), lesson.summaries_CV, clean_C)
            stage, at_receiver = self._mesh.sender_stage(direction, link), (direction, RECEIVED)
            if lesson.lessons_CV is not None:
                self._transfers[stage].learn(at_receiver, lesson.lessons_CV, clean_C)
            if lesson.ahead_CV is not None:
                overlapping_C = self._observer.renewal.overlapping_X[direction, stage]
                self._transfers[stage].learn(at_receiver, lesson.ahead_CV, clean_C & overlapping_C, NEXT)
        renewed, stale = self._observer.renewal.learn(of_senders(clean))
        for stage, transfers in enumerate(self._transfers):
            for direction in (FORWARD, BACKWARD):
                transfers.renew((direction, RECEIVED), renewed[direction, stage], stale[direction, stage])

    def _look_at_pair(
        self, direction: int, link: int, entering: Looks, leaving: Looks
    ) -> tuple[np.ndarray, torch.Tensor, torch.Tensor | None]:
        """Rows [C, M, PAIR_ROWS] on a link's senders, and what they teach in the lasting and the next projections."""
        stage = self._mesh.sender_stage(direction, link)
        renewal, known = self._observer.renewal, self._transfers[stage].known((direction, RECEIVED))
        if known is not None:
            ready_C1 = torch.from_numpy(renewal.ready_X[direction, stage][:, None]).to(known.w_KK.device)
            known = Known(
                torch.where(ready_C1, known.expected_K, torch.nan), torch.where(ready_C1[..., None], known.w_KK, 0.0)
            )
        rows_CMS, lessons_JCMV = pair_rows(entering.now, leaving.now, known)
        lesson_CV, ahead_CV = lessons_JCMV[0].mean(1), None
        if entering.ahead is not None and leaving.ahead is not None:
            ahead_CV = torch.zeros_like(lesson_CV)
            overlapping = np.flatnonzero(renewal.overlapping_X[direction, stage])
            ahead_CV[overlapping] = lessons(entering.ahead, leaving.ahead)[0].mean(1)
        return rows_CMS.cpu().numpy(), lesson_CV, ahead_CV

    def _numbers(self, rows_NV: torch.Tensor) -> np.ndarray:
        """[N, V] on any device -> [C, M, V] on the host."""
        return np.ascontiguousarray(rows_NV.cpu().numpy()).reshape(self._mesh.replicas, -1, rows_NV.shape[1])

    def _by_column(self, rows_NV: torch.Tensor) -> torch.Tensor:
        """Mean over each column's messages, [N, V] -> [C, V]."""
        return rows_NV.view(self._mesh.replicas, -1, rows_NV.shape[1]).mean(1)
