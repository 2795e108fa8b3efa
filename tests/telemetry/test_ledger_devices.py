import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.telemetry.devices import (
    BYTES,
    NOBODY,
    Device,
    claimed_by,
    from_bytes,
    keys_of,
    own_device,
    read_gathered,
    shared_places,
    to_bytes,
)

words = st.text("AZaz09._:-", max_size=32)


@given(st.builds(Device, words.filter(bool), st.integers(0, 65535), words, words, words))
@settings(max_examples=100, deadline=None)
def test_a_device_travels_whole(device):
    said = to_bytes(device)
    assert said.shape == (BYTES,) and said.dtype == np.uint8 and from_bytes(said) == device


@given(st.binary(min_size=BYTES, max_size=BYTES), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_strangers_bytes_are_a_device_or_a_value_error(said, begins_well):
    said = np.frombuffer(b"dev2\0\0\0\0" + said[8:] if begins_well else said, np.uint8)
    try:
        device = from_bytes(said)
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 500
    else:
        assert from_bytes(to_bytes(device)) == device and str(device).isprintable() and device.key.isprintable()


@pytest.mark.parametrize(
    "said", [np.zeros(BYTES - 1, np.uint8), np.zeros(BYTES, np.int8), np.zeros((1, BYTES), np.uint8)]
)
def test_bytes_of_another_size_are_none(said):
    with pytest.raises(ValueError, match=rf"allowed is uint8 \[{BYTES}\]"):
        from_bytes(said)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"host": "two words"}, "host"),
        ({"host": "x" * 129}, "host"),
        ({"uuid": "\x1b[31m"}, "uuid"),
        ({"pci": "a\nb"}, "pci"),
        ({"name": "cuda 0"}, "name"),
        ({"slot": -1}, "slot"),
        ({"slot": 65536}, "slot"),
    ],
)
def test_what_no_device_can_be(values, what):
    with pytest.raises(ValueError, match=f"{what} of a device is"):
        Device(**{"host": "node", "slot": 0, **values})


def test_a_device_is_kept_by_the_most_lasting_name_it_has():
    assert Device("node", 3, "ab-cd", "0:1:2").key == "gpu:ab-cd"
    assert Device("node", 3, "", "0:1:2").key == "pci:node/0:1:2"
    assert Device("node", 3).key == "cpu:node/3"
    assert NOBODY.key == "unnamed"


def test_this_process_without_a_gpu(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "nöde one")
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert own_device(torch.device("cpu")) == Device("n_de_one", 5, name="cpu")
    assert own_device(torch.device("cpu"), slot=2) == Device("n_de_one", 2, name="cpu")
    monkeypatch.setenv("LOCAL_RANK", "none")
    assert own_device(torch.device("cpu")).slot == 0


@pytest.mark.parametrize("told_by", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize(
    ("chosen", "here", "slot"),
    [
        ("0,2,3", "3", 2),
        ("3", "4", 1),
        ("0,1,2,3", "3", 1),
        ("GPU-8f3c,GPU-9a1b,GPU-11aa", "3", 1),
        ("", "1", 1),
        ("0,2,3", "", 1),
    ],
)
def test_a_slot_is_the_one_that_the_launcher_chose(monkeypatch, told_by, chosen, here, slot):
    """As DeepSpeed does for --include and --exclude; not where each process sees its own alone, or there are more."""
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("LOCAL_RANK", "1"), ("CUDA_VISIBLE_DEVICES", chosen), (told_by, here)):
        monkeypatch.setenv(name, value)
    assert own_device(torch.device("cpu")).slot == slot


@pytest.mark.parametrize(
    ("properties", "uuid", "pci"),
    [
        (
            {"uuid": "8f3c-11", "pci_domain_id": 0, "pci_bus_id": 129, "pci_device_id": 0},
            "8f3c-11",
            "00000000:81:00",
        ),
        ({"uuid": "00000000-0000-0000-0000-000000000000", "pci_bus_id": 3}, "", ""),
        ({}, "", ""),
    ],
    ids=["all", "zeros and half an address", "an old torch"],
)
def test_this_process_with_a_gpu(monkeypatch, properties, uuid, pci):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(**properties))
    device = own_device(torch.device("cuda", 0), slot=1)
    assert (device.uuid, device.pci, device.slot, device.name) == (uuid, pci, 1, "cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_says_its_uuid():
    device = own_device(torch.device("cuda", 0))
    assert device.key.startswith("gpu:") and from_bytes(to_bytes(device)) == device


def test_what_is_gathered_is_put_where_the_workers_are():
    devices = [Device("node", rank) for rank in range(4)]
    said = np.stack([to_bytes(device) for device in devices])
    said[1, 0] ^= 1
    read, told = read_gathered(said, np.array([[2, 0], [3, 1]]))
    assert read == ((devices[2], devices[0]), (devices[3], NOBODY))
    assert len(told) == 1 and "worker (stage 1, replica 1) does not say which device it runs on" in told[0]


def test_two_who_claim_one_place_of_a_host_are_told_of():
    """A worker that is bad could give its neighbour's host: then it is this that shows it."""
    mine, claimed, other = Device("node-1", 2, "u"), Device("node-1", 2, "v"), Device("node-1", 3, "w")
    devices = [[mine, other], [claimed, Device("node-2", 2, "x")]]
    (told,) = shared_places(devices)
    assert told.startswith("node-1 slot 2 is named as its place by worker (stage 0, replica 0) and worker (stage 1, ")
    assert claimed_by(mine, devices) == (Worker(0, 0), Worker(1, 0)) == claimed_by(claimed, devices)
    assert claimed_by(other, devices) == (Worker(0, 1),)
    said = np.stack([to_bytes(device) for device in (mine, other, claimed, NOBODY)])
    assert shared_places([[Device("node-1", 2), Device("node-1", 2)], [mine, NOBODY]])
    said[3] = 0
    assert read_gathered(said, np.arange(4).reshape(2, 2))[1][-1] == told, "all ranks know, and rank 0 says it"


def test_a_gpu_in_two_hosts_and_a_device_without_a_name():
    devices = [[Device("a", 0, "u"), Device("b", 0, "u")], [NOBODY, NOBODY]]
    assert claimed_by(devices[0][0], devices) == (Worker(0, 0), Worker(0, 1))
    assert claimed_by(NOBODY, devices) == ()
    assert not shared_places(devices), "that is told of as the ledger's names"


def test_a_launcher_that_tells_no_local_rank_makes_one_line():
    """All say slot 0 then, on every host."""
    devices = [[Device(f"node-{host}", 0, f"u{host}{gpu}") for gpu in range(4)] for host in range(9)]
    (told,) = shared_places(devices)
    assert "; and 6 more such places" in told and told.count(" slot 0 is named") == 3 and "LOCAL_RANK" in told


def test_names_that_two_workers_give():
    same, alone = Device("a", 0, "u"), Device("a", 1, "v")
    assert keys_of([[same, same], [alone, NOBODY]])[0] == (("gpu:u", "gpu:u"), ("gpu:v", "unnamed"))
    keys, told = keys_of([[same, alone], [Device("b", 0, "u"), NOBODY]])
    assert keys == (("gpu:u@a", "gpu:v"), ("gpu:u@b", "unnamed"))
    assert len(told) == 1 and "worker (stage 0, replica 0) on a, worker (stage 1, replica 0) on b" in told[0]
