"""How ranks find each other: the store that all of them reach.

Nothing here waits longer than it is told to, and every wait ends at once on a signal.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from largescale.distributed import stopping
from largescale.distributed.launch import Launch, start_id
from shards.ground.errors import InputError

_POLL_S = 0.2
_SAID_AFTER_S = 10.0

_log = logging.getLogger(__name__)


def join(launch: Launch, *, timeout_s: float, uses: str = "") -> dist.Store:
    """Meet the other ranks.

    Args:
        launch: this rank and where to meet.
        timeout_s: time for all of them to join.
        uses: a device that no two ranks of a host can share; empty for none.

    Returns:
        The ranks' store, once all are there.

    Raises:
        InputError: they cannot meet; says why, and which ranks are missing, if known.
        StoppedWaiting: a signal asked to stop meanwhile.

    Collectives: every rank must call it.
    """
    deadline = time.monotonic() + timeout_s
    store = dist.PrefixStore(start_id(), connect(launch, deadline))
    try:
        store.set(f"here/{launch.rank}", json.dumps([socket.gethostname(), uses]))
        store.add("here", 1)
        if launch.rank == 0:
            verdict = _assembled(launch, store, deadline, timeout_s)
            store.set("verdict", verdict)
            if verdict:
                time.sleep(1.0)  # the store ends with this process; the others read the verdict there
        else:
            # A little longer than rank 0 waits, so that its verdict, which names the missing ranks, arrives first.
            verdict = _verdict(launch, store, deadline + _POLL_S, timeout_s)
    except dist.DistError as error:
        stopping.leave_if_asked(f"waiting for other ranks ({launch.place})")  # as rank 0 was, maybe a moment before
        raise InputError(f"{launch.place}: lost the connection to rank 0; its log says why") from error
    if verdict:
        raise InputError(verdict)
    return store


def _assembled(launch: Launch, store: dist.Store, deadline: float, timeout_s: float) -> str:
    """On rank 0: wait for all ranks; returns what is wrong with them, empty if nothing is."""
    for waited in _until(deadline, f"waiting for other ranks ({launch.place})"):
        if store.add("here", 0) >= launch.world_size:
            return _shared_devices([json.loads(store.get(f"here/{rank}")) for rank in range(launch.world_size)])
        if waited:
            _log.warning("waiting for %s (%s)", _absent(launch, store), launch.place)
    return _too_late(launch, store, timeout_s)


def _verdict(launch: Launch, store: dist.Store, deadline: float, timeout_s: float) -> str:
    for _ in _until(deadline, f"waiting for other ranks ({launch.place})"):
        if store.check(["verdict"]):
            return store.get("verdict").decode()
    return _too_late(launch, store, timeout_s)


def _too_late(launch: Launch, store: dist.Store, timeout_s: float) -> str:
    return (
        f"{_absent(launch, store)} of {launch.world_size} did not join within run.join_timeout_s={timeout_s:g} "
        f"({launch.place}): check their logs, and whether they can reach this address"
    )


def _absent(launch: Launch, store: dist.Store) -> str:
    missing = [rank for rank in range(launch.world_size) if not store.check([f"here/{rank}"])] or [0]
    shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return f"rank{'s' * (len(missing) > 1)} {shown}"


def _shared_devices(ranks: list[tuple[str, str]]) -> str:
    """What is wrong if ranks on a host have the same device; `ranks`: host and device of each."""
    first: dict[tuple[str, str], int] = {}
    for rank, (host, device) in enumerate(ranks):
        other = first.setdefault((host, device), rank)
        if device and other != rank:
            return (
                f"ranks {other} and {rank} on {host} would share a GPU ({device}): start one rank per GPU on that host"
            )
    return ""


def connect(launch: Launch, deadline: float) -> dist.Store:
    """A new connection to the ranks' store, which torchrun or rank 0 keeps; rank 0 opens it.

    Raises:
        InputError: nothing answers there; the name is unknown; the port is taken.
        StoppedWaiting: a signal asked to stop meanwhile.
    """
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    opens = launch.rank == 0 and not kept_by_torchrun and launch.place not in _opened
    # Rank 0 can reach what it opened itself, whatever its machine is called elsewhere.
    address = "localhost" if launch.rank == 0 and not kept_by_torchrun else launch.address
    if not opens:
        _wait_for_answer(launch, address, deadline)
    try:
        store = dist.TCPStore(
            address,
            launch.port,
            is_master=opens,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
        )
    except (dist.DistError, RuntimeError) as error:
        if opens:
            raise InputError(
                f"MASTER_PORT={launch.port}: cannot be opened on {socket.gethostname()} "
                f"({_first_sentence(error)}); choose another port, or stop what uses it"
            ) from error
        raise InputError(
            f"{launch.place}: what answers there is not rank 0 ({_first_sentence(error)}); choose another port"
        ) from error
    if opens:
        _opened[launch.place] = store
    return store


_opened: dict[str, dist.Store] = {}
"""Stores this process keeps open for as long as it lives."""


def _wait_for_answer(launch: Launch, address: str, deadline: float) -> None:
    why = "no answer"
    unknown = ""
    for _ in _until(deadline, f"waiting for rank 0 ({launch.place})"):
        try:
            socket.create_connection((address, launch.port), timeout=2.0).close()
        except socket.gaierror as error:
            unknown = f"MASTER_ADDR={address}: {error.strerror}; name the host of rank 0"
            if error.errno != socket.EAI_AGAIN:  # as a server of names says to some of hundreds that ask at once
                raise InputError(unknown) from error
        except OSError as error:
            why, unknown = error.strerror or str(error), ""
        else:
            return
    raise InputError(
        unknown or f"{launch.place}: rank 0 cannot be reached there ({why}): did it start, and is this its address?"
    )


def _until(deadline: float, doing: str) -> Iterator[bool]:
    """Rounds until a deadline; True from time to time, when it is time to log that this takes long."""
    said = time.monotonic()
    while time.monotonic() < deadline:
        stopping.leave_if_asked(doing)
        late = time.monotonic() - said > _SAID_AFTER_S
        said = time.monotonic() if late else said
        yield late
        time.sleep(_POLL_S)


def _first_sentence(error: Exception) -> str:
    return re.split(r"\. |\n", str(error))[0][:200]
