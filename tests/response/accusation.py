"""Made-up accusations: messages of one column around stage 2 of 5, the evidence they give, and who kept what."""

from dataclasses import replace

import numpy as np
import torch

from deepspeed_sentinel.evidence.keeping import look_again
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.probe import End
from deepspeed_sentinel.evidence.statement import Statement
from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.evidence.table import NAMES, OF_PAIR, RECEIVED, SENT
from deepspeed_sentinel.evidence.transfer import Known, pair_rows
from deepspeed_sentinel.judgement.verdict import Finding, Verdict
from deepspeed_sentinel.kernels.token_sketch import DIMENSIONS, sketch_rows
from deepspeed_sentinel.mesh import FORWARD, Mesh, Worker

CPU = torch.device("cpu")
MESH, COLUMN, MICRO_BATCHES = Mesh(5, 2), 1, 4
ACCUSED = Worker(2, COLUMN)
SEEDS = (11, 12, 13)
LAYOUT = Layout(np.full((MESH.links, 1), 80), np.full((2, MESH.links), 2))


def finding(direction=FORWARD, **changes):
    fields = {
        "worker": ACCUSED,
        "direction": direction,
        "link": 2 if direction == FORWARD else 1,
        "column": COLUMN,
        "micro_batches": (0, 1, 2, 3),
        "striking": (0, 1, 2, 3),
        "micro_batch": 0,
        "cause": "fences",
        "statistic": "transfer_cosine",
        "value": 0.1,
        "residual": -1.0,
        "low": -0.1,
        "high": 0.1,
        "score": 5.0,
        "trusted": False,
        "overflow": False,
        "rests_on_pair": True,
        "telling": (0, 1, 2, 3),
    }
    return Finding(**{**fields, **changes})


def verdict(*findings, convicted=(), newly=()):
    links, stages, replicas = MESH.links, MESH.stages, MESH.replicas
    messages = np.zeros((2, links, replicas, MICRO_BATCHES))
    mask = np.zeros((stages, replicas), bool)
    for worker in (*convicted, *newly):
        mask[worker] = True
    suspected = np.arange(replicas) == COLUMN
    return Verdict(
        step=30,
        warming_up=False,
        judged=messages.size,
        scores=messages,
        alarms=messages > 0,
        disputes=messages > 0,
        worker_scores=np.zeros((stages, replicas)),
        suspected=suspected,
        excluded=suspected,
        convicted=mask,
        findings=findings,
        disputed=(),
        newly_convicted=tuple(newly),
        released=(),
        skip=False,
        overflow=False,
        halt=None,
        suspects=np.zeros((stages, replicas), bool),
    )


class Case:
    """What one direction's neighbours of the accused kept, and evidence that follows from it.

    Attributes:
        first, second: honest statements.
        evidence: its rows are of ``seen``, by default the messages themselves: pass other ones to let a neighbour lie.
    """

    def __init__(self, direction=FORWARD, kept=1, forged=1.0, tokens=40):
        generator = torch.Generator().manual_seed(3)
        entering = torch.randn(2, tokens, 80, generator=generator)
        leaving = entering + 0.3 * torch.randn(2, tokens, 80, generator=generator)
        map_KK = 0.1 * torch.randn(DIMENSIONS, DIMENSIONS, generator=generator)
        known = Known(torch.rand(DIMENSIONS, generator=generator), map_KK)
        positions = torch.arange(tokens)
        self.direction = direction
        self.first = Statement(kept, SEEDS, (known,), (entering, positions))
        self.second = Statement(kept, SEEDS, (known,), (leaving, positions))
        ends: tuple[End, End] = ((direction, SENT), (direction, RECEIVED))
        before = 1 if direction == FORWARD else 3
        links = (1, 2) if direction == FORWARD else (2, 1)
        lie = replace(self.second, tensors=(forged * leaving, positions))
        looks = [
            look_again(statement, end, stage, MESH, LAYOUT, CPU)
            for statement, end, stage in (
                (self.first, ends[0], before),
                (self.second, ends[1], 4 - before),
                (lie, ends[1], 4 - before),
            )
        ]
        entered, left = (looks[index].sketches[0].first(sketch_rows(looks[0].tokens[0])) for index in (0, 2))
        rows = pair_rows(entered, left, known)[0]
        statistics = np.zeros((2, 2, MESH.links, 2, MICRO_BATCHES, len(NAMES)))
        statistics[:, direction, links[1], COLUMN, kept, OF_PAIR] = rows[0].double().numpy()
        digests = np.zeros((*statistics.shape[:5], 2), np.int64)
        for look, link in zip(looks[:2], links, strict=True):
            digests[:, direction, link, COLUMN, kept] = look.digests
        self.evidence = Evidence(MESH, 30, statistics, digests)
