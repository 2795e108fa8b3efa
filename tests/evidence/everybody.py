"""All workers of a mesh in one process: their keys and their halves of the secrets."""

import numpy as np
import torch

from deepspeed_sentinel.evidence.keys import Keys, private_key
from deepspeed_sentinel.evidence.sketch import PairSketches
from deepspeed_sentinel.evidence.transfer import Sketches
from deepspeed_sentinel.kernels.token_sketch import token_sketch_reference
from deepspeed_sentinel.mesh import Mesh, Worker

CPU = torch.device("cpu")


def everybodys_keys(ranks, seed=7):
    private = [private_key(seed, rank) for rank in range(ranks)]
    public = [key.public_key().public_bytes_raw() for key in private]
    return [Keys(rank, key, public) for rank, key in enumerate(private)]


def pair_sketches(mesh, seed=7):
    """{worker: its ``PairSketches``}; ranks count replicas first."""
    ranks = np.arange(mesh.stages * mesh.replicas).reshape(mesh.stages, mesh.replicas)
    keys = everybodys_keys(ranks.size, seed)
    workers = [Worker(stage, replica) for stage in range(mesh.stages) for replica in range(mesh.replicas)]
    return {worker: PairSketches(mesh, worker, ranks, CPU, keys[ranks[worker]]) for worker in workers}


def sketch_at(pairs, end, step, message_MTD):
    """What a worker's secret sketches of M messages at an end are."""
    seeds_J2 = pairs.seeds(step, public_seed=0)[end][1:]
    sketch_MJmK, norms_MJm = token_sketch_reference(message_MTD, seeds_J2)
    tokens_M = torch.full((len(message_MTD),), float(message_MTD.shape[1]))
    return Sketches(sketch_MJmK.transpose(0, 1), norms_MJm[:, 0], tokens_M)


MESH = Mesh(5, 3)
