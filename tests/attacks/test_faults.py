"""The inject block at work: when and where faults act, and what they remember."""

import pytest
import torch

from deepspeed_sentinel.attacks.faults import Faults
from deepspeed_sentinel.config import SentinelConfig
from deepspeed_sentinel.mesh import Worker

MESSAGE = torch.randn(3, 40, 10, generator=torch.Generator().manual_seed(0))
CULPRIT = Worker(1, 2)


def apply(faults, *where_and_message):
    """What becomes of a message of one tensor."""
    *where, message = where_and_message
    return faults.apply(*where, (message,))[0]


def faults(worker=CULPRIT, **changes):
    entry = {"stage": 1, "replica": 2, "attack": "scaling", "start_step": 5, "stop_step": 8, **changes}
    return Faults(SentinelConfig.parse({"inject": [entry]}).inject, worker, seed=0)


def message_of(step, micro_batch=0):
    return MESSAGE + 100 * step + 10 * micro_batch


def test_faults_act_on_their_worker_direction_place_and_steps_only():
    assert not faults(Worker(1, 1))
    mine = faults()
    for step in range(12):
        tampered = apply(mine, "compute", "forward", step, 0, MESSAGE)
        assert (tampered is not MESSAGE) == (5 <= step < 8)
    assert apply(mine, "compute", "backward", 6, 0, MESSAGE) is MESSAGE
    assert apply(mine, "transit", "forward", 6, 0, MESSAGE) is MESSAGE


def test_probability_is_drawn_anew_for_each_message_and_repeats():
    def acted():
        mine = faults(probability=0.3, stop_step=None)
        return [
            apply(mine, "compute", "forward", step, mb, MESSAGE) is not MESSAGE
            for step in range(5, 105)
            for mb in (0, 1)
        ]

    assert acted() == acted()
    assert 0.2 < sum(acted()) / 200 < 0.4


def test_delay_sends_the_honest_message_of_that_many_steps_ago():
    mine = faults(attack="delay", steps=3, stop_step=None)
    for step in range(10):
        for micro_batch in range(2):
            sent = apply(mine, "compute", "forward", step, micro_batch, message_of(step, micro_batch))
            expected = message_of(step - 3 if step >= 5 else step, micro_batch)
            assert torch.equal(sent, expected), (step, micro_batch)


def test_memory_holds_no_more_than_declared():
    mine = faults(attack="delay", steps=3, stop_step=None)
    for step in range(20):
        apply(mine, "compute", "forward", step, 0, message_of(step))
    (fault,) = mine._faults
    assert [len(kept) for kept in fault.memory._past.values()] == [3]
    plain = faults()
    plain.enter("forward", 0, (MESSAGE,))
    apply(plain, "compute", "forward", 6, 0, MESSAGE)
    (fault,) = plain._faults
    assert not fault.memory._past and fault.memory.previous is None and not plain._entered


def test_delay_without_a_message_that_old_is_honest():
    mine = faults(attack="delay", steps=3, start_step=0, stop_step=None)
    apply(mine, "compute", "forward", 0, 0, message_of(0))
    assert torch.equal(apply(mine, "compute", "forward", 4, 0, message_of(4)), message_of(4))


def test_replay_sends_the_micro_batch_before():
    mine = faults(attack="replay", start_step=1, stop_step=None)
    order = [(step, micro_batch) for step in range(3) for micro_batch in range(2)]
    sent = [apply(mine, "compute", "forward", *at, message_of(*at)) for at in order]
    for index in range(2, len(order)):
        assert torch.equal(sent[index], message_of(*order[index - 1]))


def test_pass_through_sends_what_entered_in_its_direction():
    mine = faults(attack="pass_through", direction="backward")
    for micro_batch in range(2):
        mine.enter("forward", micro_batch, (-MESSAGE,))
        mine.enter("backward", micro_batch, (message_of(0, micro_batch),))
    for micro_batch in range(2):
        sent = apply(mine, "compute", "backward", 6, micro_batch, MESSAGE)
        assert torch.equal(sent, message_of(0, micro_batch))
        apply(mine, "transit", "backward", 6, micro_batch, sent)
    assert not mine._entered, "what has left is forgotten"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"attack": "stale_weights"}, "only the simulator has"),
        ({"attack": "framing"}, 'use "report"'),
        ({"attack": "intermittent", "inner": "nothing"}, "'nothing' is unknown"),
    ],
)
def test_what_a_live_run_cannot_do_is_refused(entry, said):
    with pytest.raises(ValueError, match=said):
        faults(**entry)


def test_composites_are_written_beside_the_other_keys():
    mine = faults(attack="subset_of_tokens", inner="constant", inner_arguments={"value": 2.0}, fraction=0.5)
    tampered = apply(mine, "compute", "forward", 6, 0, MESSAGE)
    assert (tampered == 2.0).all(-1).sum() == 60


IDS, SMALL = torch.arange(120).view(3, 40), torch.ones(2)


def test_a_fault_acts_on_the_tensor_that_it_names_and_by_default_on_the_hidden_state():
    message = (IDS, SMALL, MESSAGE)
    for tensor, index in ((None, 2), (0, 0), (1, 1)):
        sent = faults(tensor=tensor, factor=-1).apply("compute", "forward", 6, 0, message)
        for position, (one, honest) in enumerate(zip(sent, message, strict=True)):
            assert torch.equal(one, -honest if position == index else honest)
    with pytest.raises(ValueError, match='"tensor": 3, but the message has 3 tensors'):
        faults(tensor=3).apply("compute", "forward", 6, 0, message)


def test_pass_through_sends_what_entered_in_the_place_of_the_same_tensor():
    for tensor, entered, index in ((1, (IDS, 5 * SMALL), 1), (None, (SMALL, 5 * MESSAGE), 1), (0, (3 * MESSAGE,), 0)):
        message = (IDS, SMALL) if tensor == 1 else (MESSAGE,) if tensor == 0 else (SMALL, MESSAGE)
        mine = faults(attack="pass_through", tensor=tensor)
        mine.enter("forward", 0, entered)
        assert torch.equal(mine.apply("compute", "forward", 6, 0, message)[index], entered[index])
