"""How to start again without the convicted: lines to paste, from what ``exclude.json`` holds. It may hold anything."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

# Nothing that a shell would act on.
_OPTION = re.compile(r"--(include|exclude)=[A-Za-z0-9._:,@-]+|--num_gpus=\d+")
_TORCHRUN = re.compile(r"(CUDA_VISIBLE_DEVICES=[\d,]+ )?torchrun (--nnodes=\d+ )?--nproc_per_node=\d+")
_HOST_LINE = re.compile(r"[A-Za-z0-9._:-]+ slots=\d+")
_HOSTFILE = "hosts.left"
_ON_ONE_HOST = ("--include=localhost:", "--num_gpus=")
_MOST = 6  # hosts, or lines for them, that are told one by one


def lines_to_start(exclude: Mapping[str, Any], notes: list[str], convicted: bool) -> dict[str, Any]:
    """ "lines", each with its "text", what it is "for" and a "note" beside it; and "replicas_left", or None.

    Args:
        exclude: of ``exclude.json``.
        notes: what could not be told is added to.
        convicted: whether somebody is.
    """
    if not exclude and convicted:
        notes.append("exclude.json is not there, or is of a later run: there are no lines to start again without them")
    lines = [*_of_deepspeed(exclude, notes), *_of_torchrun(exclude), *_of_slurm(exclude, notes)]
    note = _text(exclude, "note")
    if lines and note:
        lines[0]["note"] = note
    elif note:
        notes.append(note)
    left = exclude.get("replicas_left")
    return {"lines": lines, "replicas_left": left if isinstance(left, int) and lines else None}


def _of_deepspeed(exclude: Mapping[str, Any], notes: list[str]) -> Iterator[dict[str, Any]]:
    option = _option(exclude, "deepspeed", notes)
    if not option:
        return
    if option.startswith(_ON_ONE_HOST):
        yield _line("DeepSpeed's launcher, on that host and without a hostfile", f"deepspeed {option} ...")
        return
    hosts = exclude.get("hostfile")
    fit = (
        [one for one in hosts if isinstance(one, str) and _HOST_LINE.fullmatch(one)] if isinstance(hosts, list) else []
    )
    file = f"--hostfile={_HOSTFILE} " if fit else ""
    yield _line("DeepSpeed's launcher, with these slots alone", f"deepspeed {file}{option} ...")
    if fit:
        yield _line(f"{_HOSTFILE}, the hostfile of that line", "\n".join(fit))


def _of_torchrun(exclude: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Hosts that start the same are told in one line."""
    said = exclude.get("torchrun")
    hosts: dict[str, list[str]] = defaultdict(list)
    for host, text in said.items() if isinstance(said, dict) else ():
        if isinstance(text, str) and _TORCHRUN.fullmatch(text):
            hosts[text].append(str(host))
    for text, of_text in list(hosts.items())[:_MOST]:
        names = ", ".join(of_text[:_MOST]) + (f" and {len(of_text) - _MOST} more" if of_text[_MOST:] else "")
        yield _line(f"torchrun, on {names}", f"{text} ...")
    if len(hosts) > _MOST:
        yield _line("torchrun, on other hosts: see exclude.json", "")


def _of_slurm(exclude: Mapping[str, Any], notes: list[str]) -> Iterator[dict[str, Any]]:
    option = _option(exclude, "slurm", notes)
    if option:
        note = _text(exclude, "slurm_note")
        # The note says of which hosts what else goes; the launcher's own words are for where there is none.
        yield _line("SLURM" if note else "SLURM, which leaves out whole hosts", f"sbatch {option} ...", note)


def _line(what_for: str, text: str, note: str = "") -> dict[str, Any]:
    return {"for": what_for, "text": text, "note": note}


def _text(exclude: Mapping[str, Any], name: str) -> str:
    said = exclude.get(name)
    return said if isinstance(said, str) else ""


def _option(exclude: Mapping[str, Any], name: str, notes: list[str]) -> str:
    said = _text(exclude, name)
    if said and not _OPTION.fullmatch(said):
        notes.append(f"the line for {name} in exclude.json is not shown: it has characters that a shell acts on")
        return ""
    return said
