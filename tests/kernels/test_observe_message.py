import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_sentinel.evidence.probe import Probe
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.kernels import observe_message as module
from deepspeed_sentinel.kernels.dispatch import INTERPRETED, runs_on_triton
from deepspeed_sentinel.kernels.message_statistics import message_statistics
from deepspeed_sentinel.kernels.observe_message import observe_message
from deepspeed_sentinel.kernels.token_sketch import sketch_rows, token_sketch
from deepspeed_sentinel.mesh import BACKWARD, FORWARD, Mesh

SEEDS = torch.tensor([[1, 2], [3, 4]])
# What makes the host wait for a device, by the name of the operator.
WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select")


class NoWaiting(TorchDispatchMode):
    """Fails on operators that read values back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def outputs(x_TD, jobs=2):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=x_TD.device)

    rows = sketch_rows(x_TD.shape[0])
    statistics = empty(x_TD.shape[1]), empty(3), empty(2, dtype=torch.int32)
    return statistics, (empty(jobs, rows, 64), empty(jobs, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("coarse_programs")
def test_the_same_bits_as_its_parts(device, dtype):
    x_TD = torch.randn(70, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_TD[3, 4] = math.nan
    x_TD, seeds, copy_TD = x_TD.to(device), SEEDS.to(device), torch.empty_like(x_TD, device=device)
    statistics, sketches = outputs(x_TD)
    observe_message(x_TD, seeds, *statistics, *sketches, copy_TD)
    one_by_one, sketched = outputs(x_TD)
    message_statistics(x_TD, *one_by_one)
    token_sketch(x_TD, seeds, *sketched)
    for together, apart in zip((*statistics, *sketches), (*one_by_one, *sketched), strict=True):
        assert torch.equal(together, apart)
    torch.testing.assert_close(copy_TD, x_TD, equal_nan=True, rtol=0, atol=0)


@pytest.mark.usefixtures("coarse_programs")
def test_two_launches_a_message(device, monkeypatch):
    if not runs_on_triton(torch.empty(0, device=device)):
        pytest.skip("the references launch nothing")
    launched = []
    kernel_class = type(module._observe_kernel)
    run = kernel_class.run

    def counting(self, *args, **kwargs):
        launched.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kernel_class, "run", counting)
    probe = Probe(Mesh(3, 2), 1, device, seed=0)
    probe.begin_step(2)
    for end in probe.ends:
        for _ in range(2):
            probe.observe(end, probe.next_micro_batch(end), (torch.ones(12, 40, device=device),))
    assert len(launched) == 2 * 2 * len(probe.ends)


def observe_a_step(probe, message):
    probe.begin_step(2)
    for end in ((FORWARD, RECEIVED), (FORWARD, SENT), (BACKWARD, RECEIVED), (BACKWARD, SENT)):
        for _ in range(2):
            probe.observe(end, probe.next_micro_batch(end), (message,))


def test_nothing_waits_for_the_device_in_the_message_path(device):
    """On a GPU CUDA itself reports; in the interpreter the launchers, all of the host's part, run the same way."""
    message = torch.ones(12, 40, device=device)
    probe = Probe(Mesh(3, 2), 1, device, seed=0)
    observe_a_step(probe, message)  # compiles
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            observe_a_step(probe, message)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    elif INTERPRETED:
        with NoWaiting():
            observe_a_step(probe, message)
    else:  # on a CPU the references may look at values, which costs nothing there: the guard must see that
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            observe_a_step(probe, message)


@pytest.mark.gpu
def test_a_captured_graph_reads_new_messages_and_new_seeds():
    if not torch.cuda.is_available() or INTERPRETED:
        pytest.skip("no CUDA device")
    x_TD = torch.randn(700, 320, device="cuda").bfloat16()
    seeds = SEEDS.cuda()
    statistics, sketches = outputs(x_TD)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        observe_message(x_TD, seeds, *statistics, *sketches)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        observe_message(x_TD, seeds, *statistics, *sketches)
    x_TD.copy_(torch.randn_like(x_TD))
    seeds.add_(5)
    graph.replay()
    expected_statistics, expected_sketches = outputs(x_TD)
    observe_message(x_TD, seeds, *expected_statistics, *expected_sketches)
    for replayed, expected in zip((*statistics, *sketches), (*expected_statistics, *expected_sketches), strict=True):
        assert torch.equal(replayed, expected)


def test_wrong_arguments_are_refused(device):
    x_TD = torch.ones(5, 3, device=device)
    statistics, sketches = outputs(x_TD)
    with pytest.raises(ValueError, match=r"column_sums_D must be float32 \[3\]"):
        observe_message(x_TD, SEEDS.to(device), statistics[0][:2], *statistics[1:], *sketches)
    with pytest.raises(ValueError, match=r"norms_Jm must be float32 \[2, 5\]"):
        observe_message(x_TD, SEEDS.to(device), *statistics, sketches[0], sketches[1][:1])
