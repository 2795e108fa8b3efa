"""What counts as a lost worker, on texts that torch 2.13's gloo raises."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from deepspeed_sentinel.engine.communication import in_short, is_communication

PAIR = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
OF_GLOO = {
    PAIR
    + "Connection closed by peer [127.0.0.1]:49285. This is typically caused by a remote worker crashing. Check the "
    "logs of the remote worker before reporting an error. GLHF! 🏖️": "Connection closed by peer [127.0.0.1]:49285",
    "[enforce fail at /__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:801] state_ >= CONNECTED. "
    "1 vs 4. Pair is not connected ([127.0.0.1]:31153$1 <--> [none])": "state_ >= CONNECTED. 1 vs 4. "
    "Pair is not connected ([127.0.0.1]:31153$1 <--> [none])",
    PAIR
    + "Read error [127.0.0.1]:10470: Connection reset by peer. This is typically caused by a remote worker hanging or "
    "bugs in the application. Check the logs of the remote worker before reporting an error. GLHF! 🏖️": "Read error "
    "[127.0.0.1]:10470: Connection reset by peer",
    "Application timeout caused pair closure": "Application timeout caused pair closure",
}


@pytest.mark.parametrize("text", OF_GLOO)
def test_gloos_errors_are_known_and_told_in_short(text):
    assert is_communication(RuntimeError(text)) and in_short(RuntimeError(text)) == OF_GLOO[text]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cannot store the batch: connection timed out"),
        RuntimeError("gloo: my own words"),
        ConnectionError("broken pipe to my data server"),
        ValueError("nccl"),
    ],
)
def test_a_users_own_words_are_none(error):
    with pytest.raises(type(error)) as raised:
        raise error
    assert not is_communication(raised.value)


def test_what_torch_itself_raises_about_a_store_is_one(free_store):
    free_store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(dist.DistError) as raised:
        free_store.get("missing")
    assert is_communication(raised.value)
