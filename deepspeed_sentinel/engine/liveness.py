"""Who is gone, stuck or has failed: heartbeats through the rendezvous store, so that a broken run says what broke it.

Each rank has a thread, its heart, that beats once a second: with a count, and with the place where the main thread is
(``progress``). Three things end a run:

    a watched call raises      a communication error: whose heart has stopped is named. Any other: its text is posted
    nothing raises, no rank    the heart of a rank that waits sees who holds the run up (``standstill``) and posts it
    gets on
    somebody has posted        a main thread that then still hangs in a watched call is ended by its own heart

What is posted is signed (``board``), and begins with the name of who says it where that is not who it is about.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist

from deepspeed_sentinel.engine.board import Board
from deepspeed_sentinel.engine.communication import in_short, is_communication
from deepspeed_sentinel.engine.progress import PIPELINE, Place, Progress
from deepspeed_sentinel.engine.standstill import Beat, Standstill, waits
from deepspeed_sentinel.errors import LostWorker, SentinelError, SentinelHalt
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.mesh import Mesh, Worker, identity

BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 5.0
GRACE_SECONDS = 10.0
RETRY_SECONDS = 10.0
LOOK_SECONDS = 2.0
RANKS_A_SECOND = 50  # how many heartbeats a rank reads: all ranks may look at once, and one store serves them
SHARE_OF_TIMEOUT = 0.9  # of the group's: shortly before torch ends the run, without a name
EXIT_CODE = 70


class Liveness:
    """Heartbeat of this rank and diagnosis of the others. Collective to create.

    Attributes:
        progress: to be told where the main thread is.
        ends: whether it ends this rank where nothing raises; otherwise it says what it sees, once.

    Args:
        mesh: the mesh.
        ranks: int [S, R], the global rank of each worker.
        control: gathers of all ranks.
        heartbeat_timeout: seconds, see the config.
        timeouts: of the default group and of the groups between stages.
        step: the global step.
        wiring: int64 [S, C] of a global step; by default DeepSpeed's own in all.
        ends: see above.
        fill: names workers in full, in a text that people read.
    """

    def __init__(
        self,
        mesh: Mesh,
        ranks: np.ndarray,
        control: Control,
        *,
        heartbeat_timeout: float = 120.0,
        timeouts: tuple[timedelta, timedelta] = (timedelta(minutes=10), timedelta(minutes=10)),
        step: Callable[[], int] = lambda: 0,
        wiring: Callable[[int], np.ndarray] | None = None,
        ends: bool = True,
        fill: Callable[[str], str] = str,
    ) -> None:
        self._workers = {
            int(ranks[stage, replica]): Worker(stage, replica)
            for stage in range(mesh.stages)
            for replica in range(mesh.replicas)
        }
        self._rank = dist.get_rank()
        self._heartbeat_timeout = heartbeat_timeout
        self._timeouts = timeouts
        self.ends, self._fill = ends, fill
        self.progress = Progress(step)
        own = identity(mesh)
        self._standstill = Standstill(
            self._workers, self._rank, heartbeat_timeout, self._patience, wiring or (lambda step: own)
        )
        self._board = Board(control, PATIENCE_SECONDS)
        self._beats = itertools.count()
        self._busy = False
        self._failure: str | None = None
        self._said = False
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="sentinel-liveness", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def name(self, rank: int) -> str:
        return self._standstill.name(rank)

    def stop(self) -> None:
        """Stop beating, and let the others know that this is the end of a run or of a script, not of a machine."""
        self._stopped.set()
        self._thread.join(timeout=2 * BEAT_SECONDS)
        atexit.unregister(self.stop)
        # Where the store has ended before, nobody is left who could ask.
        if self._board.connected:
            with suppress(RuntimeError):
                self._beat(ended=True)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Turn a communication error inside into LostWorker, and tell the other ranks of any error but a halt.

        Errors of Sentinel's leave it with workers named in full.

        Raises:
            LostWorker: also at once, where another rank has told that it failed.
        """
        if self._failure and self.ends:
            raise LostWorker(self._fill(self._failure))
        self._busy = True
        self.progress.enter()
        try:
            yield
        except SentinelError as error:
            error.args = (self._fill(str(error)),)
            if not isinstance(error, SentinelHalt):
                self._post(f"{self.name(self._rank)} stopped: {error}")
            raise
        except Exception as error:
            if is_communication(error):
                raise LostWorker(self._fill(self._diagnose(error))) from error
            self._post(f"{self.name(self._rank)} failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._busy = False
            self.progress.leave()

    def watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, whole in ``watch``."""

        @functools.wraps(method)
        def in_watch(*args: Any, **kwargs: Any) -> Any:
            with self.watch():
                return method(*args, **kwargs)

        return in_watch

    def _diagnose(self, error: Exception) -> str:
        saw = in_short(error)
        try:
            before = self._read_beats()
            self._stopped.wait(PATIENCE_SECONDS)
            told = self._told()
            after = {} if told else self._read_beats()
        except RuntimeError:
            # Its host may be gone by now, and the heart may have heard of the reason before.
            told = self._failure
            if not told:
                return self._without_store(f"{self.name(self._rank)} saw: {saw}")
        if told:
            self._stopped.wait(2 * BEAT_SECONDS)  # the store may end with this process, and others have not read it
            return f"{told} [{self.name(self._rank)} learnt of it as: {saw}]"
        others = [rank for rank in self._workers if rank != self._rank]
        ended = [rank for rank in others if rank in after and after[rank].ended]
        gone = [rank for rank in others if rank not in ended and _same(before.get(rank), after.get(rank))]
        # Who went by an error of its own may only have met the loss of another in a collective of the user's.
        names = ", ".join(map(self.name, gone or ended))
        what = f"lost {names}" if names else "a link between two live ranks broke"
        text = f"{what}. Resume from the last checkpoint. {self.name(self._rank)} saw: {saw}"
        self._post(text)
        return text

    def _run(self) -> None:
        noticed = still = without_store = unlooked = 0.0
        place, before, retry = self.progress.place, time.monotonic(), 0.0
        look_seconds = max(LOOK_SECONDS, len(self._workers) / RANKS_A_SECOND)
        while not self._stopped.wait(BEAT_SECONDS):
            # A process that was suspended must not count what it did not see.
            now = time.monotonic()
            seconds, before = min(now - before, 2 * PATIENCE_SECONDS), now
            if not self._busy or self.progress.place != place:
                place, still, unlooked = self.progress.place, 0.0, 0.0
                self._standstill.forget()
            else:
                still += seconds
                unlooked += seconds
            without_store = min(without_store + seconds, still) if retry else 0.0
            try:
                if now >= retry:
                    self._beat()
                    retry = 0.0
                    if not self._told() and unlooked >= look_seconds:
                        seen, unlooked = self._standstill.look(unlooked, self._read_beats()), 0.0
                        if seen:
                            self._found(seen)
                            noticed = GRACE_SECONDS  # here nothing will raise any more
            except RuntimeError:
                # It may be late, or gone with its host; a run that gets on does not need it.
                retry = now + RETRY_SECONDS
            if without_store >= self._heartbeat_timeout and waits(place):
                self._found(self._without_store(f"{self.name(self._rank)} waited in {place}"), alone=True)
            noticed = noticed + seconds if self._failure and self._busy else 0.0
            if self._failure and noticed > PATIENCE_SECONDS + GRACE_SECONDS:
                self._end(self._failure)

    def _found(self, text: str, alone: bool = False) -> None:
        """The heart has seen why the run stands still; ``alone``: there is no way to tell the others."""
        if not self.ends:
            if not self._said:
                print(
                    f'[sentinel] {self._fill(text)} (nothing is ended: "action" is "observe")',
                    file=sys.stderr,
                    flush=True,
                )
            self._said = True
        elif alone:
            self._end(text)
        else:
            self._board.post(text)
            self._told()

    def _end(self, text: str) -> None:
        if self.ends:
            said = self._fill(f"{self.name(self._rank)} ends because {text}")
            print(f"[sentinel] {said}", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)

    def _patience(self, place: Place) -> float:
        every, between_stages = self._timeouts
        return SHARE_OF_TIMEOUT * (between_stages if place.phase == PIPELINE else every).total_seconds()

    def _beat(self, ended: bool = False) -> None:
        self._board.write_beat(Beat(next(self._beats), self.progress.place, ended).to_text())

    def _read_beats(self) -> dict[int, Beat]:
        beats = {rank: Beat.from_text(text) for rank, text in self._board.read_beats(self._workers).items()}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def _post(self, text: str) -> None:
        """Let every rank read it; the first is kept, since later ones are its consequences.

        The store ends with its host, so nobody goes before the others had two beats' time.
        """
        try:
            self._board.post(text)
            self._stopped.wait(2 * BEAT_SECONDS)
        except RuntimeError as error:
            said = self._fill(f"could not tell the other ranks ({error}): {text}")
            print(f"[sentinel] {said}", file=sys.stderr, flush=True)

    def _told(self) -> str | None:
        if self._failure is None and (post := self._board.read_post(self._workers)):
            rank, text = post
            about_itself = text.startswith(self.name(rank))
            self._failure = text if about_itself else f"{text} (said by {self.name(rank)})"
        return self._failure

    def _without_store(self, saw: str) -> str:
        return (
            "the rendezvous store is gone: the process that holds it (rank 0, or the launcher of the first node) "
            f"ended, {self.name(0)}. {saw}"
        )


def _same(before: Beat | None, after: Beat | None) -> bool:
    """Whether a heart has not beaten between two looks."""
    return after is None or (before is not None and before.count >= after.count)
