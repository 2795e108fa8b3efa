"""Where statements are handed in: plain sockets, because a stranger's bytes must not reach gloo.

Who sends gloo more than the other side has asked for ends that process (``terminate``, from a thread of gloo's), and
who sends nothing makes a wait time out that closes every connection of the group. So an auditor opens a port for as
long as a hearing lasts, and each witness hands its statement in there:

    frame = header | HMAC(key, header) | body | HMAC(key, header | body)            HMAC with SHA-256, 32 bytes each

The key is made for this one statement of what witness and auditor share (``evidence.keys``), so nobody can speak in
another's name. A header that no key fits is nobody's and is dropped; after one that fits, all that is wrong is the
witness's. Whatever comes is read into memory that the header was checked for, and until a deadline.

So many callers may wait at once, and who has not said who it is after the others came gives way to the next: who
connects and says nothing keeps nobody out. One byte tells a witness that it need not come again; until then it does.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Generic, TypeVar

import numpy as np
import torch

from deepspeed_sentinel.evidence.statement import WORDS, Header, Malformed, Statement

_HEADER_BYTES, _MAC_BYTES = 8 * WORDS, 32
_CONNECT_SECONDS = 5.0
_HEADER_SECONDS = 10.0  # until a caller has to have said who it is
_MOST_CALLERS = 64
_HEARD = b"\x06"
_PAUSE_SECONDS = 0.1  # before another try
_CHUNK = 1 << 20
Name = TypeVar("Name")


@dataclass(frozen=True)
class Unheard:
    """Why there is no statement.

    Attributes:
        why: in words.
        false: it came from the witness and is none; else nothing came in time, which may be the network's fault.
    """

    why: str
    false: bool


class Desk(Generic[Name]):
    """An open port at which statements are handed in, until it is closed.

    Args:
        keys: for each expected statement, by any name, its key.
        most_bytes: of a message, what to take.
        device: where the statements' tensors go.
        seconds: for each, how long to wait once they are asked for.
    """

    def __init__(
        self, keys: Mapping[Name, bytes], most_bytes: int, device: torch.device, seconds: Mapping[Name, float]
    ) -> None:
        self._keys, self._most_bytes, self._device = dict(keys), most_bytes, device
        self._seconds = dict(seconds)
        self._heard: queue.SimpleQueue[tuple[Name, Statement | Unheard]] = queue.SimpleQueue()
        self._taken: set[Name] = set()
        self._lock = threading.Lock()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._socket = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=_MOST_CALLERS)
        self._unknown: dict[socket.socket, None] = {}  # callers that have not said who they are, the oldest first
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._accept, name="sentinel-desk", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # else accept() goes on waiting
        self._socket.close()

    def statements(self) -> dict[Name, Statement | Unheard]:
        """All expected statements, as soon as each was handed in or its time is up."""
        heard: dict[Name, Statement | Unheard] = {}
        start = time.monotonic()
        while missing := self._seconds.keys() - heard.keys():
            left = start + max(self._seconds[name] for name in missing) - time.monotonic()
            try:
                name, said = self._heard.get(timeout=max(left, 0.0))
            except queue.Empty:
                heard.update((name, Unheard("nothing came in time", false=False)) for name in missing)
                break
            heard.setdefault(name, said)
        return heard

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return  # closed
            with self._lock:
                self._unknown[caller] = None
                crowded = len(self._unknown) > _MOST_CALLERS
                oldest = next(iter(self._unknown))
                if crowded:
                    del self._unknown[oldest]
            if crowded:
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its own thread closes it
            threading.Thread(target=self._serve, args=(caller,), name="sentinel-desk", daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError, EOFError), caller:
                frame = _receive(caller, _HEADER_BYTES + _MAC_BYTES, time.monotonic() + _HEADER_SECONDS)
                name = self._whose(frame)
                if name is None:
                    return
                with self._lock:
                    self._unknown.pop(caller, None)
                    first = name not in self._taken
                    self._taken.add(name)
                if first:
                    self._heard.put((name, self._answer(caller, frame[:_HEADER_BYTES], name)))
                caller.sendall(_HEARD)
        finally:
            with self._lock:
                self._unknown.pop(caller, None)

    def _whose(self, frame: bytearray) -> Name | None:
        """The statement whose key fits."""
        header, mac = frame[:_HEADER_BYTES], bytes(frame[_HEADER_BYTES:])
        for name, key in self._keys.items():
            if hmac.compare_digest(hmac.digest(key, header, sha256().name), mac):
                return name
        return None

    def _answer(self, caller: socket.socket, raw_header: bytearray, name: Name) -> Statement | Unheard:
        try:
            return self._read(caller, raw_header, name)
        except Malformed as error:
            return Unheard(str(error), false=True)
        except (OSError, EOFError) as error:
            return Unheard(f"it broke off: {error}", false=False)
        except (MemoryError, RuntimeError) as error:
            return Unheard(f"there was no room for it: {error}", false=False)

    def _read(self, caller: socket.socket, raw_header: bytearray, name: Name) -> Statement | Unheard:
        header = Header.from_words(np.frombuffer(raw_header, "<i8"), self._most_bytes)
        deadline = time.monotonic() + self._seconds[name]
        body = _receive(caller, header.body_bytes, deadline)
        mac = _receive(caller, _MAC_BYTES, deadline)
        whole = hmac.new(self._keys[name], raw_header, sha256)
        whole.update(body)
        if not hmac.compare_digest(whole.digest(), bytes(mac)):
            return Unheard("it was altered on its way", false=False)
        body_N = torch.frombuffer(body, dtype=torch.uint8) if body else torch.empty(0, dtype=torch.uint8)
        return Statement.from_parts(header, body_N, self._device)


def frame_of(statement: Statement, key: bytes) -> Iterator[bytes | memoryview]:
    """The bytes that hand a statement in, piece by piece."""
    header = statement.header.to_words().tobytes()
    body = statement.body().numpy().data
    yield header
    yield hmac.digest(key, header, sha256().name)
    yield body
    whole = hmac.new(key, header, sha256)
    whole.update(body)
    yield whole.digest()


def hand_in(pieces: Iterator[bytes | memoryview], addresses: Sequence[str], port: int, seconds: float) -> str | None:
    """Send a statement to an auditor, again and again until it was heard: others may crowd the desk.

    Args:
        pieces: see ``frame_of``.
        addresses: of the auditor's host, the likeliest first.
        port: of its desk.
        seconds: how long to try.

    Returns:
        None, or why it could not be sent: the auditor will say so too.
    """
    deadline = time.monotonic() + seconds
    whole = list(pieces)
    while True:
        reasons, again = [], False
        for address in addresses:
            left = deadline - time.monotonic()
            try:
                connection = socket.create_connection((address, port), timeout=max(min(_CONNECT_SECONDS, left), 1e-3))
            except OSError as error:
                reasons.append(f"{address}: {error}")
                again = again or isinstance(error, TimeoutError)  # else nobody is there, or no more
                continue
            with connection:
                problem = _send(connection, whole, deadline)
            if problem is None:
                return None
            reasons.append(f"{address}: {problem}")
            again = True
            break
        if not again or time.monotonic() + _PAUSE_SECONDS >= deadline:
            return "; ".join(reasons) or "the auditor gave no address"
        time.sleep(_PAUSE_SECONDS)


def _send(connection: socket.socket, whole: Sequence[bytes | memoryview], deadline: float) -> str | None:
    """Send all of it and wait until it was heard; None, or why it was not."""
    problem = "the auditor hung up"
    try:
        for piece in whole:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            connection.sendall(piece)
    except OSError as error:
        problem = str(error)  # it may have been heard before
    try:
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        return None if connection.recv(1) == _HEARD else problem
    except OSError as error:
        return str(error)


def own_addresses(towards: str) -> list[str]:
    """Addresses under which other workers may reach this host, the likeliest first.

    Args:
        towards: a host that all workers reach, such as that of the rendezvous.
    """
    found = [_of_interface(name) for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    with contextlib.suppress(OSError):
        for family, _, _, _, target in socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing: it only asks for the route
                found.append(str(probe.getsockname()[0]))
                break
    with contextlib.suppress(OSError):
        found.append(socket.gethostbyname(socket.gethostname()))
    return list(dict.fromkeys(address for address in found if address))


def _of_interface(name: str) -> str | None:
    """IPv4 address of a network interface, on Linux."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            asked = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
        return socket.inet_ntoa(asked[20:24])
    except (ImportError, OSError):
        return None


def _receive(caller: socket.socket, count: int, deadline: float) -> bytearray:
    """Exactly so many bytes; memory is taken for no more than these."""
    data = bytearray(count)
    view, have = memoryview(data), 0
    while have < count:
        caller.settimeout(max(deadline - time.monotonic(), 1e-3))
        got = caller.recv_into(view[have : have + _CHUNK])
        if not got:
            raise EOFError(f"{have} of {count} bytes")
        have += got
    return data
