"""Speed of the kernels beside eager torch, torch.compile and a plain copy of the same message, in one run.

    python benchmarks/kernels.py

Needs torch, triton and numpy (matplotlib for the picture); deepspeed is not needed and the package need not be
installed. On a machine without a GPU it runs the CPU path at small sizes and says so. Inputs rotate through more memory
than any cache holds; "hot" is the same input over and over, as a message just received is.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import support
import torch

support.find_package()

from deepspeed_sentinel.kernels.baseline_distances import (  # noqa: E402
    baseline_distances,
    baseline_distances_reference,
    baseline_update,
    baseline_update_reference,
)
from deepspeed_sentinel.kernels.keyed_digest import DigestKey  # noqa: E402
from deepspeed_sentinel.kernels.message_statistics import (  # noqa: E402
    message_statistics,
    message_statistics_reference,
)
from deepspeed_sentinel.kernels.observe_message import observe_message  # noqa: E402
from deepspeed_sentinel.kernels.sliced_wasserstein import (  # noqa: E402
    sliced_wasserstein,
    sliced_wasserstein_reference,
)
from deepspeed_sentinel.kernels.token_sketch import sketch_rows, token_sketch, token_sketch_reference  # noqa: E402
from deepspeed_sentinel.kernels.transfer_statistics import (  # noqa: E402
    transfer_statistics,
    transfer_statistics_reference,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GPU_SIZES = ((1024, 1024), (2048, 2048), (4096, 3072), (4096, 4096), (8192, 4096), (8192, 8192), (16384, 8192))
CPU_SIZES = ((256, 256), (1024, 1024), (2048, 2048))
ROTATED = 1 << 30 if CUDA else 1 << 27  # bytes that the inputs of one size take together


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50 if CUDA else 20)
    parser.add_argument("--batch", type=int, default=20 if CUDA else 2, help="calls a sample")
    parser.add_argument("--micro-batches", type=int, default=16, help="of the operations done once a step")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.samples < 2:
        parser.error(f"--samples must be at least 2, got {options.samples}")
    return options


def buffers(tokens: int, hidden: int) -> dict[str, torch.Tensor]:
    rows = sketch_rows(tokens)
    return {
        "seeds": torch.tensor([[1, 2], [3, 4], [3, 5]], device=DEVICE),  # public, fresh and lasting
        "sums": torch.empty(hidden, device=DEVICE),
        "scalars": torch.empty(3, device=DEVICE),
        "digest": torch.empty(2, dtype=torch.int32, device=DEVICE),
        "keyed": torch.empty(1, dtype=torch.int64, device=DEVICE),
        "sketch": torch.empty(3, rows, 64, device=DEVICE),
        "norms": torch.empty(3, rows, device=DEVICE),
    }


def fingerprint(tokens: int, hidden: int, dtype: torch.dtype) -> str:
    """Hash of all outputs for an input made on the CPU: equal on two GPUs if the bits are."""
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    out = buffers(tokens, hidden)
    statistics = (out["sums"], out["scalars"], out["digest"])
    observe_message(x, out["seeds"], *statistics, out["sketch"], out["norms"])
    digest = hashlib.sha256()
    for tensor in (*statistics, out["sketch"], out["norms"]):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def message_operations(
    xs: list[torch.Tensor], out: dict[str, torch.Tensor], compiled: Callable[..., Any] | None
) -> dict[str, list[Callable[[], Any]]]:
    """What is timed on a message; every operation has one call for each input."""
    statistics, sketches = (out["sums"], out["scalars"], out["digest"]), (out["sketch"], out["norms"])
    copy, key = torch.empty_like(xs[0]), DigestKey(torch.tensor([12345], device=DEVICE))
    operations: dict[str, Callable[[torch.Tensor], Any]] = {
        "copy": lambda x: copy.copy_(x),
        "message_statistics": lambda x: message_statistics(x, *statistics),
        "message_statistics, copying": lambda x: message_statistics(x, *statistics, copy),
        "token_sketch, 1 job": lambda x: token_sketch(x, out["seeds"][:1], sketches[0][:1], sketches[1][:1]),
        "token_sketch, 3 jobs": lambda x: token_sketch(x, out["seeds"], *sketches),
        "observe_message, 1 job": lambda x: observe_message(
            x, out["seeds"][:1], *statistics, sketches[0][:1], sketches[1][:1]
        ),
        "observe_message, 1 job, keyed": lambda x: observe_message(
            x, out["seeds"][:1], *statistics, sketches[0][:1], sketches[1][:1], None, key, out["keyed"]
        ),
        "observe_message, 3 jobs": lambda x: observe_message(x, out["seeds"], *statistics, *sketches),
    }
    if CUDA:
        operations["message_statistics, eager torch"] = message_statistics_reference
        operations["token_sketch, 3 jobs, eager torch"] = lambda x: token_sketch_reference(x, out["seeds"])
        if compiled is not None:
            operations["message_statistics, torch.compile"] = compiled
    else:
        operations["clone and sum of squares"] = lambda x: (x.clone(), x.float().pow(2).sum())
    return {name: [lambda x=x, f=f: f(x) for x in xs] for name, f in operations.items()}


def measure_message(tokens: int, hidden: int, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    size = tokens * hidden * dtype.itemsize
    count = max(2, ROTATED // size) if CUDA else max(2, min(16, ROTATED // size))
    xs = [torch.randn(tokens, hidden, device=DEVICE).to(dtype) for _ in range(min(count, 256))]
    out = buffers(tokens, hidden)
    row: dict[str, Any] = {
        "tokens": tokens,
        "hidden": hidden,
        "dtype": str(dtype).removeprefix("torch."),
        "mebibytes": size / 2**20,
        "rotated_inputs": len(xs),
        "operations": {},
    }
    compiled = None
    if CUDA and not options.no_compile:
        torch._dynamo.reset()  # else its limit of recompilations is reached and it falls back to eager
        compiled = torch.compile(message_statistics_reference, dynamic=False)
        try:
            compiled(xs[0])
        except Exception as error:  # a comparison that cannot be made must not cost the measurement of the kernels
            compiled, row["torch_compile_error"] = None, f"{type(error).__name__}: {str(error)[:500]}"
            print(f"torch.compile failed: {row['torch_compile_error']}")
    for name, calls in message_operations(xs, out, compiled).items():
        entry = support.quantiles(support.device_seconds(calls, options.samples, options.batch))
        hot = support.quantiles(support.device_seconds(calls[:1], options.samples, options.batch))
        entry["hot_median_us"] = hot["median_us"]
        if CUDA:
            entry["host_median_us"] = support.quantiles(support.host_seconds(calls[0], options.samples))["median_us"]
        moved = 2 * size if "cop" in name else size
        entry["gigabytes_per_second"] = moved / entry["median_us"] / 1e3
        row["operations"][name] = entry
    copied = row["operations"]["copy"]["gigabytes_per_second"]
    for entry in row["operations"].values():
        entry["of_copy_bandwidth"] = entry["gigabytes_per_second"] / copied
    fingerprints = {fingerprint(tokens, hidden, dtype) for _ in range(3)}
    row["bits_identical"] = len(fingerprints) == 1
    row["bits"] = sorted(fingerprints)[0]
    return row


def measure_step(hidden: int, options: argparse.Namespace) -> dict[str, Any]:
    """What is done once a step, for all micro-batches of one end of a link."""
    messages, replicas = options.micro_batches, 8
    entering, leaving = torch.randn(2, messages, 256, 64, device=DEVICE)
    norms = entering.norm(dim=-1), leaving.norm(dim=-1)
    w = torch.randn(64, 64, device=DEVICE)
    means, quantiles = torch.randn(messages, hidden, device=DEVICE), sliced_wasserstein(entering, hidden)
    values = hidden + quantiles.shape[1]
    average, summaries = torch.randn(values, device=DEVICE), torch.randn(replicas, values, device=DEVICE)
    clean = torch.ones(replicas, dtype=torch.bool, device=DEVICE)
    operations: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "sliced_wasserstein": (
            lambda: sliced_wasserstein(entering, hidden),
            lambda: sliced_wasserstein_reference(entering, hidden),
        ),
        "baseline_distances": (
            lambda: baseline_distances(means, quantiles, average, 0.5),
            lambda: baseline_distances_reference(means, quantiles, average, 0.5),
        ),
        "baseline_update": (
            lambda: baseline_update(average, summaries, clean, 0.9),
            lambda: baseline_update_reference(average, summaries, clean, 0.9),
        ),
        "transfer_statistics": (
            lambda: transfer_statistics(entering, leaving, *norms, w),
            lambda: transfer_statistics_reference(entering, leaving, *norms, w),
        ),
    }
    row: dict[str, Any] = {"hidden": hidden, "micro_batches": messages, "replicas": replicas, "operations": {}}
    for name, (kernel, eager) in operations.items():
        row["operations"][name] = support.quantiles(support.device_seconds([kernel], options.samples, options.batch))
        if CUDA:
            row["operations"][f"{name}, eager torch"] = support.quantiles(
                support.device_seconds([eager], options.samples, options.batch)
            )
    return row


def draw(document: dict[str, Any], path: Path) -> None:
    """The roofline: bandwidth reached over the message's size, below the bandwidth of a copy."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = document["messages"]
    names = ["copy", "message_statistics", "message_statistics, torch.compile", "message_statistics, eager torch"]
    names += ["observe_message, 3 jobs", "clone and sum of squares"]
    labels = {
        "copy": "plain copy (bytes read and written)",
        "observe_message, 3 jobs": "observe_message: statistics and three sketches",
        "clone and sum of squares": "x.clone() and x.float().pow(2).sum()",
    }
    figure, axes = plt.subplots(figsize=(8, 5))
    for dtype, style in (("bfloat16", "-"), ("float32", "--")):
        chosen = [row for row in rows if row["dtype"] == dtype]
        for index, name in enumerate(names):
            points = [
                (row["mebibytes"], row["operations"][name]["gigabytes_per_second"])
                for row in chosen
                if name in row["operations"]
            ]
            if points:
                label = labels.get(name, name) if style == "-" else None
                axes.plot(*zip(*points, strict=True), style, marker="o", ms=4, color=f"C{index}", label=label)
    axes.set(xscale="log", yscale="log", xlabel="message (MiB)", ylabel="GB/s of the message's bytes")
    axes.set_title(f"Bandwidth reached on {document['device']}\nsolid: bfloat16, dashed: float32", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def main() -> None:
    options = parse()
    place = "gpu" if CUDA else "cpu"
    if not CUDA:
        print("No GPU: this is the CPU path (the torch references) at small sizes.")
    document = {"what": "microseconds a call", "path": place, **support.machine(), "messages": [], "step": []}
    for tokens, hidden in GPU_SIZES if CUDA else CPU_SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            row = measure_message(tokens, hidden, dtype, options)
            document["messages"].append(row)
            print(
                f"[{tokens}, {hidden}] {row['dtype']}, {row['mebibytes']:.1f} MiB, same bits: {row['bits_identical']}"
            )
            for name, entry in row["operations"].items():
                print(
                    f"  {name:38s} {entry['median_us']:10.1f} us ({entry['p10_us']:.1f} to {entry['p90_us']:.1f}), hot "
                    f"{entry['hot_median_us']:10.1f}; {entry['gigabytes_per_second']:8.1f} GB/s, "
                    f"{entry['of_copy_bandwidth']:.2f} of a copy"
                )
    for hidden in (1024, 3072, 8192) if CUDA else (256, 1024):
        row = measure_step(hidden, options)
        document["step"].append(row)
        print(f"once a step, hidden {hidden}, {row['micro_batches']} micro-batches")
        for name, entry in row["operations"].items():
            print(f"  {name:38s} {entry['median_us']:10.1f} us")
    out = options.out or support.ROOT / "benchmarks" / "results" / f"kernels_{place}.json"
    support.write(out, document)
    draw(document, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
