"""The control plane: small gathers of all ranks on the CPU, over groups of a column and of a stage.

A gloo group connects each of its ranks with each other. One of all N ranks would take N - 1 sockets in every process,
and a ring over all of them. Rows and columns of the mesh take S - 1 + R - 1: of 64 x 64 ranks 126 in place of 4,095.

What a rank says reaches all others by two ways:

    within its column, then from there within each stage;        within its stage, then from there within each column

so it is handed on once, by another worker each way. Where the two arrive different, somebody on them lies, and the run
ends with the names of those who can have done it.

Worked example, 2 stages x 2 replicas, worker (stage, replica): what (0, 0) says comes to (1, 1) from (1, 0), which has
it of (0, 0) itself, and from (0, 1), which has it of (0, 0) too.
"""

from __future__ import annotations

import resource
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_sentinel.compat import all_gather_single
from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.mesh import Worker

_MOST_TEXT = 1 << 16
_SPARE_FILES = 256  # what a process opens besides: libraries, data, logs, the launcher's store


class Control:
    """The groups of one rank. Collective to create, all ranks at once.

    Args:
        ranks: int [S, R], the global rank of each worker.
        timeout: of its collectives; None is torch's default.

    Raises:
        SentinelError: too few files may be open, or gloo cannot connect the ranks.
    """

    def __init__(self, ranks: np.ndarray, timeout: timedelta | None = None) -> None:
        self._ranks = ranks
        (place,) = np.argwhere(ranks == dist.get_rank()).tolist()
        self._stage, self._replica = place
        _allow_files(sum(ranks.shape))
        columns, rows = ([_connect(group, timeout) for group in groups] for groups in (ranks.T, ranks))
        self._column, self._row = columns[self._replica], rows[self._stage]

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """What every rank says, in the order of ranks: [N] -> [ranks, N]. Collective.

        Args:
            mine: any dtype, on the CPU, of the same size on all ranks.

        Raises:
            SentinelError: two workers hand on different things.
        """
        by_column_RSN = self._in_row(self._in_column(mine[None]))
        by_row_SRN = self._in_column(self._in_row(mine[None]))
        said_SRN = by_column_RSN.view(*self._ranks.T.shape, -1).transpose(0, 1).contiguous()
        differ_SR = (said_SRN.view(torch.uint8) != by_row_SRN.view(*self._ranks.shape, -1).view(torch.uint8)).any(-1)
        if differ_SR.any():
            self._refuse([Worker(*place) for place in differ_SR.nonzero().tolist()])
        result = torch.empty_like(said_SRN).flatten(0, 1)
        result[torch.from_numpy(self._ranks).flatten()] = said_SRN.flatten(0, 1)
        return result

    def gather_words(self, *words: int) -> torch.Tensor:
        """int64 [ranks, W]: what every rank says in W whole numbers. Collective."""
        return self.all_gather(torch.tensor(words, dtype=torch.int64))

    def of_first(self, text: str) -> str:
        """What rank 0 says, on all ranks, at most 2^16 bytes. Collective."""
        said = np.frombuffer(text.encode(), np.uint8) if dist.get_rank() == 0 else np.zeros(0, np.uint8)
        size = int(self.all_gather(torch.tensor([said.size]))[0])
        _check_size(size, _MOST_TEXT, Worker(*np.argwhere(self._ranks == 0)[0].tolist()))
        mine = np.zeros(max(size, 1), np.uint8)
        mine[: said.size] = said
        return bytes(self.all_gather(torch.from_numpy(mine))[0, :size].tolist()).decode()

    def of_first_stage(self, mine: torch.Tensor, most: int) -> torch.Tensor:
        """What the first stage's worker of this column says, uint8 [N], on all of the column. Collective.

        Args:
            mine: this rank's; only the first stage's counts.
            most: bytes to take.

        Raises:
            SentinelError: it announces more.
        """
        return self._broadcast(mine, Worker(0, self._replica), self._column, most)

    def of_dealer(self, mine: torch.Tensor) -> torch.Tensor:
        """What replica 0 of the first stage says, uint8 [N], on all ranks. Collective. Raises as ``of_first_stage``.

        Args:
            mine: this rank's, of the size of what is to come; only that worker's counts.
        """
        most = mine.numel()
        return self.of_first_stage(self.of_replica(mine, 0, most) if self._stage == 0 else mine, most)

    def _broadcast(
        self, mine: torch.Tensor, sender: Worker, group: dist.ProcessGroup | None, most: int
    ) -> torch.Tensor:
        if group is None:
            return mine
        source, size = int(self._ranks[sender]), torch.tensor([mine.numel()])
        dist.broadcast(size, source, group=group)
        _check_size(int(size), most, sender)
        said = mine if dist.get_rank() == source else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(said, source, group=group)
        return said

    def of_row(self, mine: torch.Tensor) -> torch.Tensor:
        """What the replicas of this stage say, [N] -> [R, N]. Collective in the stage."""
        return self._in_row(mine[None])[:, 0]

    def of_replica(self, mine: torch.Tensor, replica: int, most: int) -> torch.Tensor:
        """What one replica of this stage says, uint8 [N]. Collective in the stage. Raises as ``of_first_stage``.

        Args:
            mine: this rank's; only that of ``replica`` counts.
            replica: who speaks.
            most: bytes to take.
        """
        return self._broadcast(mine, Worker(self._stage, replica), self._row, most)

    def swap_ends(self, mine: torch.Tensor) -> torch.Tensor:
        """What the other end of this column says, of the size of ``mine``. For its first and its last stage alone."""
        other, theirs = len(self._ranks) - 1 - self._stage, torch.empty_like(mine)
        assert other in (0, len(self._ranks) - 1) and self._column is not None, self._stage
        there = int(self._ranks[other, self._replica])
        # gloo sends without waiting for the other end's receive, up to what a socket holds.
        sending = dist.isend(mine.contiguous(), there, group=self._column)
        dist.recv(theirs, there, group=self._column)
        assert sending is not None
        sending.wait()
        return theirs

    def _in_column(self, mine: torch.Tensor) -> torch.Tensor:
        return _gather(mine, self._column, len(self._ranks))

    def _in_row(self, mine: torch.Tensor) -> torch.Tensor:
        return _gather(mine, self._row, self._ranks.shape[1])

    def _refuse(self, said: list[Worker]) -> None:
        handed_on = sorted(
            {Worker(self._stage, one.replica) for one in said} | {Worker(one.stage, self._replica) for one in said}
        )
        raise SentinelError(
            f"what {', '.join(map(str, said))} said to all ranks came to {Worker(self._stage, self._replica)} in two "
            f"versions, handed on by {', '.join(map(str, handed_on))}: one of them alters it, or its sender said two "
            "things. Nothing of this step was applied. Resume from the last checkpoint without the one at fault."
        )


def _check_size(size: int, most: int, sender: Worker) -> None:
    """Before memory is taken for it."""
    if not 0 <= size <= most:
        raise SentinelError(
            f"{sender} announces {size} bytes to this rank, which takes 0 to {most} here. Resume from the last "
            "checkpoint without it, or find out what alters its words; where it is a micro-batch of a twin step, let "
            "all loaders make micro-batches of about one size."
        )


def _gather(mine: torch.Tensor, group: dist.ProcessGroup | None, size: int) -> torch.Tensor:
    """[K, N] of each of a group's ranks -> [size, K, N]; of one rank without a word."""
    if group is None:
        return mine[None].contiguous()
    everyone = torch.empty((size * len(mine), *mine.shape[1:]), dtype=mine.dtype)
    all_gather_single(everyone, mine.contiguous(), group=group)
    return everyone.view(size, *mine.shape)


def _connect(ranks: np.ndarray, timeout: timedelta | None) -> dist.ProcessGroup | None:
    if len(ranks) == 1:
        return None
    try:
        # Not with local synchronization: it names a group by how many others a rank is in, and that may differ.
        group = dist.new_group(ranks.tolist(), timeout=timeout, backend="gloo")
    except RuntimeError as error:
        raise SentinelError(
            f"gloo cannot connect this rank with ranks {ranks.tolist()}: {error}. Sentinel's small collectives run "
            "over the CPU. On several hosts, name the network interface by which they reach each other in "
            "GLOO_SOCKET_IFNAME; if it speaks of open files, raise the limit (ulimit -n)."
        ) from error
    return None if group == dist.GroupMember.NON_GROUP_MEMBER else group


def _allow_files(sockets: int) -> None:
    """Raise this process's limit of open files as far as it takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sockets + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SentinelError(
            f"this mesh takes {sockets} sockets a process, so {wanted} open files, and the limit is {soft}, at most "
            f"{hard}. Raise it (ulimit -Hn, or nofile in /etc/security/limits.conf) on every host."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
