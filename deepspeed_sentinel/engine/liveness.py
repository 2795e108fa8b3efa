"""Who is gone: heartbeats through the rendezvous store, so that a broken run says which worker broke it.

A collective only tells that some peer closed its connection. Each rank therefore beats once a second into the store
that started the job, and the first to fail looks whose heart has stopped, writes that down for the others and raises.
A rank that is stuck where no exception reaches it (a GPU collective, say) ends itself once that has been written.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist

from deepspeed_sentinel.errors import LostWorker, SentinelError, SentinelHalt
from deepspeed_sentinel.mesh import Mesh, Worker

BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 5.0
GRACE_SECONDS = 10.0
EXIT_CODE = 70
_ENDED = "ended"
_COMMUNICATION = ("gloo", "nccl", "connection", "socket", "timed out", "broken pipe", "store")
_instances = itertools.count()


class Liveness:
    """Heartbeat of this rank and diagnosis of the others.

    Args:
        mesh: the mesh.
        ranks: int [S, R], the global rank of each worker.
    """

    def __init__(self, mesh: Mesh, ranks: np.ndarray) -> None:
        self._workers = {
            int(ranks[stage, replica]): Worker(stage, replica)
            for stage in range(mesh.stages)
            for replica in range(mesh.replicas)
        }
        self._prefix = f"deepspeed_sentinel/{next(_instances)}"
        self._store = _own_connection()
        self._rank = dist.get_rank()
        self._beats = itertools.count()
        self._busy = False
        self._failure: str | None = None
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="sentinel-liveness", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def name(self, rank: int) -> str:
        return f"rank {rank} = {self._workers[rank]}"

    def stop(self) -> None:
        """Stop beating, and let the others know that this is the end of a run or of a script, not of a machine."""
        self._stopped.set()
        self._thread.join(timeout=2 * BEAT_SECONDS)
        atexit.unregister(self.stop)
        # Where the store has ended before, nobody is left who could ask.
        with suppress(RuntimeError):
            self._store.set(self._beat_key(self._rank), _ENDED)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Turn a communication error inside into LostWorker, and tell the other ranks of any error but a halt."""
        self._busy = True
        try:
            yield
        except SentinelHalt:
            raise
        except SentinelError as error:
            self._post(f"{self.name(self._rank)} stopped: {error}")
            raise
        except Exception as error:
            if _is_communication(error):
                raise LostWorker(self._diagnose(error)) from error
            self._post(f"{self.name(self._rank)} failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._busy = False

    def watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, whole in ``watch``."""

        @functools.wraps(method)
        def in_watch(*args: Any, **kwargs: Any) -> Any:
            with self.watch():
                return method(*args, **kwargs)

        return in_watch

    def _diagnose(self, error: Exception) -> str:
        before = self._read_beats()
        self._stopped.wait(PATIENCE_SECONDS)
        told = self._told()
        if told:
            return f"{told} [{self.name(self._rank)} learnt of it as: {error}]"
        after = self._read_beats()
        if before is None or after is None:
            return (
                "the rendezvous store is gone: the process that holds it (rank 0, or the launcher of the first node) "
                f"ended, {self.name(0)}. This rank saw: {error}"
            )
        silent = [rank for rank in self._workers if rank != self._rank and after[rank] in (before[rank], _ENDED)]
        # Who went by an error of its own may only have met the loss of another in a collective of the user's.
        gone = [rank for rank in silent if after[rank] != _ENDED] or silent
        names = ", ".join(map(self.name, gone))
        what = f"lost {names}" if gone else "a link between two live ranks broke"
        text = f"{what}. Resume from the last checkpoint. {self.name(self._rank)} saw: {error}"
        self._post(text)
        return text

    def _run(self) -> None:
        noticed = 0.0
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._beat()
                text = self._told()
            except RuntimeError:
                # The store ends with its host; whether that is an error the main thread finds out for itself.
                return
            noticed = noticed + BEAT_SECONDS if text and self._busy else 0.0
            if noticed > PATIENCE_SECONDS + GRACE_SECONDS:
                print(f"[sentinel] {self.name(self._rank)} ends because {text}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)

    def _beat(self) -> None:
        self._store.set(self._beat_key(self._rank), str(next(self._beats)))

    def _beat_key(self, rank: int) -> str:
        return f"{self._prefix}/beat/{rank}"

    def _read_beats(self) -> dict[int, str] | None:
        try:
            values = self._store.multi_get([self._beat_key(rank) for rank in self._workers])
        except RuntimeError:
            return None
        return {rank: value.decode() for rank, value in zip(self._workers, values, strict=True)}

    def _post(self, text: str) -> None:
        """Keep the first diagnosis, since later ones are its consequences, and let every rank read it.

        The store ends with its host, so nobody goes before the others had two beats' time.
        """
        try:
            self._store.compare_set(f"{self._prefix}/failure", "", text)
            self._stopped.wait(2 * BEAT_SECONDS)
        except RuntimeError as error:
            print(f"[sentinel] could not tell the other ranks ({error}): {text}", file=sys.stderr, flush=True)

    def _told(self) -> str | None:
        key = f"{self._prefix}/failure"
        try:
            if self._failure is None and self._store.check([key]):
                self._failure = self._store.get(key).decode()
        except RuntimeError:
            if threading.current_thread() is self._thread:
                raise
        return self._failure


def _is_communication(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _COMMUNICATION)


def rendezvous_host() -> str:
    """A host that all ranks could reach when they met."""
    store = _default_store()
    return store.host if isinstance(store, dist.TCPStore) else os.environ.get("MASTER_ADDR", "localhost")


def _default_store() -> dist.Store:
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def _own_connection() -> dist.Store:
    """A second client of the default store: the first may be blocked in a collective's set-up."""
    store = _default_store()
    if not isinstance(store, dist.TCPStore):
        return store
    return dist.TCPStore(
        store.host,
        store.port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=PATIENCE_SECONDS),
    )
