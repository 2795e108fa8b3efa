"""Who serves which column: dealt anew in every step among the workers that are not convicted.

Replicas of a stage hold the same weights, so which of them serves a column does not change what is computed there,
only who is to be trusted with it.
"""

from __future__ import annotations

import numpy as np

from deepspeed_sentinel.mesh import Mesh


def deal_columns(mesh: Mesh, convicted: np.ndarray, seed: int, step: int) -> np.ndarray:
    """The replica of each stage that serves each column in this step, int64 [S, C].

    First and last stage stay put: they load inputs and labels. A convicted worker's share goes to the others of its
    stage, as evenly as can be; where all of a stage are convicted there is nobody else, and all serve.

    Args:
        mesh: stages and replicas; there are as many columns as replicas.
        convicted: bool [S, R].
        seed, step: of the deal.
    """
    generator = np.random.default_rng((seed, step, 1))
    served = np.tile(np.arange(mesh.replicas), (mesh.stages, 1))
    for stage in range(1, mesh.stages - 1):
        able = np.flatnonzero(~convicted[stage])
        if not able.size:
            able = np.arange(mesh.replicas)
        rounds = [generator.permutation(able) for _ in range(-(-mesh.replicas // able.size))]
        served[stage] = generator.permutation(np.concatenate(rounds)[: mesh.replicas])
    return served


def draw_attackers(mesh: Mesh, per_stage: int, seed: int) -> np.ndarray:
    """Which workers are malicious, bool [S, R]: ``per_stage`` of every middle stage."""
    generator = np.random.default_rng((seed, 2))
    malicious = np.zeros((mesh.stages, mesh.replicas), bool)
    for stage in range(1, mesh.stages - 1):
        malicious[stage, generator.permutation(mesh.replicas)[:per_stage]] = True
    return malicious
