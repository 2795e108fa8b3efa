"""A gradient changed only where nobody looks: whoever knows the projections can make one, so nobody must."""

import numpy as np
import pytest
import torch
from everybody import MESH, pair_sketches, sketch_at

from deepspeed_sentinel.evidence.table import NAMES, OF_PAIR, RECEIVED, SENT, comparable
from deepspeed_sentinel.evidence.transfer import Transfers, pair_rows
from deepspeed_sentinel.kernels.token_sketch import projection
from deepspeed_sentinel.mesh import BACKWARD, Worker

HIDDEN, TOKENS, STEPS = 1024, 300, 24
ATTACKER = Worker(2, 0)
# A gradient enters stage 2 from above and leaves it downwards.
ENTERED, LEFT = (BACKWARD, SENT), (BACKWARD, RECEIVED)
PUBLIC_SEED = 0


class Column:
    """The attacker's column: both neighbours, what they have learnt of stage 2, and honest gradients."""

    def __init__(self):
        everybody = pair_sketches(MESH)
        self.everybody = everybody
        self.above, self.below = everybody[Worker(3, 0)], everybody[Worker(1, 0)]
        self.generator = torch.Generator().manual_seed(1)
        self.stage_DD = 0.3 * self._normal(HIDDEN, HIDDEN) / HIDDEN**0.5
        self.transfers = Transfers(0.9, 0.8)
        self.honest_rows = [self.step(step) for step in range(STEPS)]

    def _normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def gradients(self):
        """One entering and leaving, [1, T, D]: a residual stage that changes a third."""
        spectrum_D = 1.0 / torch.arange(1, HIDDEN + 1) ** 0.25
        entering = self._normal(1, TOKENS, HIDDEN) * spectrum_D
        return entering, entering + entering @ self.stage_DD + 0.1 * self._normal(1, TOKENS, HIDDEN) * spectrum_D

    def rows(self, step, entering, leaving):
        sketches = sketch_at(self.above, ENTERED, step, entering), sketch_at(self.below, LEFT, step, leaving)
        return pair_rows(*sketches, self.transfers.known(LEFT))

    def step(self, step):
        """Report an honest step and learn from it."""
        rows, lessons = self.rows(step, *self.gradients())
        self.transfers.learn(LEFT, lessons[0].mean(0), np.array(True))
        return rows[0]

    def largest_deviation(self, step, entering, leaving):
        """How many honest standard deviations the row lies off, in the unit that fences compare."""
        honest = torch.stack(self.honest_rows[STEPS // 2 :])
        both = torch.cat([honest, self.rows(step, entering, leaving)[0]]).double().numpy()
        whole = np.zeros((len(NAMES), len(both)))
        whole[OF_PAIR] = both.T
        found = comparable(whole)[OF_PAIR]
        usual = found[:, :-1]
        return float((np.abs(found[:, -1] - usual.mean(1)) / usual.std(1)).max())


@pytest.fixture(scope="module")
def column():
    return Column()


def flipped_outside(message, seeds):
    """The message with everything negated that projections of these seeds do not show."""
    directions_DK = torch.cat(list(projection(HIDDEN, torch.tensor(sorted(seeds)))), dim=1)
    basis_DK = torch.linalg.qr(directions_DK)[0]
    return 2.0 * (message @ basis_DK) @ basis_DK.T - message


def projection_seeds(pairs, step):
    return {seed for seeds in pairs.seeds(step, PUBLIC_SEED).values() for seed in seeds[:, 1].tolist()}


def test_with_the_pairs_own_projections_nothing_would_be_seen(column):
    """What makes the two tests below mean something."""
    entering, leaving = column.gradients()
    sent = flipped_outside(leaving, projection_seeds(column.below, STEPS))
    assert torch.nn.functional.cosine_similarity(sent.flatten(), leaving.flatten(), dim=0) < -0.3
    assert column.largest_deviation(STEPS, entering, leaving) < 5
    assert column.largest_deviation(STEPS, entering, sent) < 5


def test_what_colluding_replicas_of_the_neighbouring_stages_know_does_not_help(column):
    entering, leaving = column.gradients()
    known = {PUBLIC_SEED}
    for worker in (Worker(1, 1), Worker(1, 2), Worker(3, 1), Worker(3, 2)):
        pairs = column.everybody[worker]
        end = LEFT if worker.stage == 1 else ENTERED
        known |= set(pairs.step_seeds(end, STEPS)[1:])
    assert len(known) == 5, "a fresh and a lasting one of each of their two columns"
    sent = flipped_outside(leaving, known)
    assert column.largest_deviation(STEPS, entering, sent) > 50


def test_knowing_the_neighbours_last_fresh_projection_does_not_help_either(column):
    entering, leaving = column.gradients()
    known = {column.below.step_seeds(LEFT, STEPS - 1)[1], PUBLIC_SEED}
    sent = flipped_outside(leaving, known)
    assert torch.nn.functional.cosine_similarity(sent.flatten(), leaving.flatten(), dim=0) < -0.5
    assert column.largest_deviation(STEPS, entering, sent) > 50


def test_a_leaked_lasting_projection_hides_nothing_from_the_statistics_without_memory(column):
    entering, leaving = column.gradients()
    known = {column.below.step_seeds(LEFT, STEPS)[2], PUBLIC_SEED}
    sent = flipped_outside(leaving, known)
    rows, honest = (column.rows(STEPS, entering, message)[0][0] for message in (sent, leaving))
    pair_names = [name for name, of_pair in zip(NAMES, OF_PAIR, strict=True) if of_pair]
    remembered = [pair_names.index(name) for name in ("cross_moment", "prediction_correlation", "prediction_slope")]
    torch.testing.assert_close(rows[remembered], honest[remembered], rtol=1e-3, atol=1e-4)
    assert column.largest_deviation(STEPS, entering, sent) > 50
