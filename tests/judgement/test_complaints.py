import numpy as np
import pytest

from deepspeed_sentinel.judgement.complaints import complained_of
from deepspeed_sentinel.mesh import Worker


def said(replicas, **accusations):
    """One stage of three, in which replicas complain: by index of who says it."""
    words = np.zeros((3, replicas), int)
    for who, whom in accusations.items():
        words[1, int(who[1:])] = 1 + whom
    return words


@pytest.mark.parametrize("replicas", [2, 3, 4, 5, 8])
def test_who_most_others_complain_of_is_named(replicas):
    bad = replicas - 1
    everybody_else = {f"r{replica}": bad for replica in range(replicas - 1)}
    assert complained_of(said(replicas, **everybody_else)) == (Worker(1, bad),)
    assert complained_of(said(replicas)) == ()


@pytest.mark.parametrize("replicas", [3, 4, 5, 8])
def test_fewer_than_half_cannot_have_an_honest_one_named_nor_save_one_of_their_own(replicas):
    bad = range((replicas - 1) // 2)
    assert complained_of(said(replicas, **{f"r{who}": replicas - 1 for who in bad})) == ()
    if bad:
        honest = {f"r{who}": bad[0] for who in range(len(bad), replicas)}
        assert complained_of(said(replicas, **honest)) == (Worker(1, bad[0]),)


def test_complaining_of_oneself_counts_only_where_there_is_nobody_else():
    assert complained_of(said(3, r2=2, r0=2)) == ()
    assert complained_of(said(1, r0=0)) == (Worker(1, 0),)
