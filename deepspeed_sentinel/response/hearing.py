"""How audits are held: the neighbours hand the auditor what they kept, and all ranks learn what it found."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from hashlib import sha256

import numpy as np
import torch

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.control import Control
from deepspeed_sentinel.evidence.keys import Secret
from deepspeed_sentinel.evidence.parts import Layout
from deepspeed_sentinel.evidence.probe import End
from deepspeed_sentinel.evidence.statement import Statement
from deepspeed_sentinel.evidence.step import Evidence
from deepspeed_sentinel.mesh import Worker
from deepspeed_sentinel.response.audit import Audit, Outcome, examine
from deepspeed_sentinel.response.desk import Desk, Unheard, frame_of, hand_in, own_addresses
from deepspeed_sentinel.telemetry import console

PATIENCE_SECONDS = 120.0
# For a witness that once sent nothing: whoever is silent at every step must not cost two minutes at every step.
SHORT_PATIENCE_SECONDS = 10.0
_OUTCOMES = tuple(Outcome)
_NOTICE_BYTES, _NONCE_BYTES, _PORT_BYTES = 256, 16, 2
Place = tuple[int, int]  # which audit, which of its two witnesses


class Hearing:
    """Holds the audits of a step, on every rank together.

    Args:
        worker: this worker.
        ranks: int [S, R], the global rank of each worker.
        control: gathers of all ranks on the CPU.
        device: where this worker computes.
        testify: what this worker kept at an end.
        most_bytes: how large a message may be, as far as this worker can tell.
        secret_with: what this worker shares with another rank.
        towards: a host that all workers can reach, such as that of the rendezvous.
        say: gets a line about what goes wrong here.
    """

    def __init__(
        self,
        worker: Worker,
        ranks: np.ndarray,
        control: Control,
        device: torch.device,
        *,
        testify: Callable[[End], Statement],
        most_bytes: Callable[[], int],
        secret_with: Callable[[int], Secret],
        towards: str,
        say: Callable[[str], None] = console.say,
    ) -> None:
        self._worker = worker
        self._ranks = ranks
        self._control = control
        self._device = device
        self._testify = testify
        self._most_bytes = most_bytes
        self._secret_with = secret_with
        self._towards = towards
        self._say = say
        self._once_silent: set[Worker] = set()

    def hold(self, audits: Sequence[Audit], evidence: Evidence, layout: Layout) -> tuple[Outcome, ...]:
        """What each audit found: the same on all ranks. All must call it with the same audits in the same order.

        Args:
            audits: those of the step.
            evidence: of the step.
            layout: what messages are made of.

        Raises:
            SentinelError: an auditor, which is trusted, gave no outcome.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        desk = self._open_desk(audits, nonce)
        try:
            notices = self._gather(_notice(nonce, desk.port if desk else 0, own_addresses(self._towards)))
            self._hand_in(audits, notices)
            heard = desk.statements() if desk else {}
        finally:
            if desk:
                desk.close()
        mine = np.zeros(len(audits), np.int64)
        for index, audit in enumerate(audits):
            if audit.auditor == self._worker:
                mine[index] = 1 + _OUTCOMES.index(self._outcome(index, audit, evidence, layout, heard))
        told = self._gather(torch.from_numpy(mine).view(torch.uint8)).numpy().view(np.int64)
        outcomes = tuple(
            self._told(audit, int(told[self._rank(audit.auditor), index])) for index, audit in enumerate(audits)
        )
        for audit, outcome in zip(audits, outcomes, strict=True):
            silent = audit.witness_at_fault(outcome)
            if silent is not None:
                self._once_silent.add(silent)
        return outcomes

    def _open_desk(self, audits: Sequence[Audit], nonce: bytes) -> Desk[Place] | None:
        """For the statements that this worker has to hear, if there are any."""
        keys, patience = {}, {}
        for index, audit in enumerate(audits):
            for side, (witness, _) in enumerate(audit.witnesses):
                if audit.auditor == self._worker != witness:
                    keys[index, side] = self._key(witness, nonce, (index, side))
                    once_silent = witness in self._once_silent
                    patience[index, side] = SHORT_PATIENCE_SECONDS if once_silent else PATIENCE_SECONDS
        if not keys:
            return None
        try:
            return Desk(keys, self._most_bytes(), self._device, patience)
        except OSError as error:
            self._say(f"{self._worker} cannot open a port for an audit, which stays open: {error}")
            return None

    def _hand_in(self, audits: Sequence[Audit], notices: torch.Tensor) -> None:
        """Send what this worker was asked for."""
        for index, audit in enumerate(audits):
            for side, (witness, end) in enumerate(audit.witnesses):
                if not audit.auditor != self._worker == witness:
                    continue
                nonce, port, addresses = _read_notice(notices[self._rank(audit.auditor)])
                key = self._key(audit.auditor, nonce, (index, side))
                problem = hand_in(frame_of(self._testify(end), key), addresses, port, PATIENCE_SECONDS)
                if problem:
                    self._say(
                        f"{self._worker} could not hand {audit.auditor} what it kept for an audit: "
                        f"{problem}. Name the network interface that workers reach each other by in GLOO_SOCKET_IFNAME."
                    )

    def _outcome(
        self, index: int, audit: Audit, evidence: Evidence, layout: Layout, heard: dict[Place, Statement | Unheard]
    ) -> Outcome:
        statements = []
        for side, (witness, end) in enumerate(audit.witnesses):
            if witness == self._worker:
                statements.append(self._testify(end))
                continue
            said = heard.get((index, side))
            if said is None:
                return Outcome.OPEN  # no fault of the witness: this worker has no desk
            if isinstance(said, Unheard):
                self._say(f"audit of {audit.finding.worker}: of {witness}, {said.why}")
                return Outcome.of_witness(side, said.false)
            statements.append(said)
        return examine(audit, evidence, statements[0], statements[1], layout, self._device, self._say)

    def _gather(self, mine_B: torch.Tensor) -> torch.Tensor:
        """uint8 [B] of each rank -> [ranks, B]."""
        return self._control.all_gather(mine_B)

    def _key(self, other: Worker, nonce: bytes, place: Place) -> bytes:
        """Of one statement: this worker and the other can make it, and nobody else."""
        secret = self._secret_with(self._rank(other))
        purpose = ("statement", int.from_bytes(nonce, "big"), *place)
        numbers = [secret.number(*purpose, part) for part in range(5)]  # 62 bits each
        return sha256(b"".join(number.to_bytes(8, "big") for number in numbers)).digest()

    def _rank(self, worker: Worker) -> int:
        return int(self._ranks[worker])

    @staticmethod
    def _told(audit: Audit, told: int) -> Outcome:
        if not 1 <= told <= len(_OUTCOMES):
            raise SentinelError(f"{audit.auditor} gave no outcome of its audit of {audit.finding.worker}: {told}")
        return _OUTCOMES[told - 1]


def _notice(nonce: bytes, port: int, addresses: Sequence[str]) -> torch.Tensor:
    """Where to hand statements in, uint8 [_NOTICE_BYTES]."""
    text = nonce + port.to_bytes(_PORT_BYTES, "big")
    for address in addresses:
        if len(text) + len(address) < _NOTICE_BYTES:
            text += address.encode("ascii", "ignore") + b" "
    return torch.frombuffer(bytearray(text.ljust(_NOTICE_BYTES, b" ")), dtype=torch.uint8)


def _read_notice(notice: torch.Tensor) -> tuple[bytes, int, list[str]]:
    raw = bytes(notice.tolist())
    port = int.from_bytes(raw[_NONCE_BYTES : _NONCE_BYTES + _PORT_BYTES], "big")
    return raw[:_NONCE_BYTES], port, raw[_NONCE_BYTES + _PORT_BYTES :].decode("ascii", "ignore").split()
