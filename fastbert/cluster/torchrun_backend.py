"""`torchrun --rdzv-backend fastbert --rdzv-endpoint HOST:PORT`: torchrun's own c10d rendezvous, with other manners.

- Its store listens on HOST's address alone. torch's listens on every interface of the machine, and whoever reaches a store can end the run.
- The workers' store is made by rank 0's worker, which listens in the same way, and not by the agent: TORCH_DISABLE_SHARE_RDZV_TCP_STORE.
- A lost node is noticed after 10 seconds instead of 15, and those that are left wait 10 seconds for others instead of 30. Each is an option of
  `--rdzv-conf` with torch's name: keep_alive_interval, keep_alive_max_attempt, last_call_timeout. Not much less: the nodes' clocks are
  compared, and a machine that is too busy to answer looks like a lost one.
- An agent that is cut off from the store gives up after 15 seconds. torch's waits for an answer until TCP gives up, a quarter of an hour.
- A node is known by the address from which it reaches HOST, where torch asks the host's name, which often means 127.0.1.1.
- All that agents read from the store is signed with the run's key (signature.py). One value is unpickled by torch, the state of the
  rendezvous (rendezvous_state.py): without a signature, whoever reaches the port runs code here. The others are text, JSON and counts
  (rendezvous_rounds.py).

torchrun imports this at every start, whichever backend is asked for; so what is heavy is imported when it is used.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from fastbert.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

NAME = "fastbert"
DEFAULTS = {
    "keep_alive_interval": 2,
    "keep_alive_max_attempt": 5,
    "last_call_timeout": 10,
}  # seconds; how often; seconds
JOIN_TIMEOUT_S = 600  # torch's own
READ_TIMEOUT_S = 60  # torch's own
ANSWER_S = 10.0  # and SILENCE_S of rendezvous.py on top


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun's registry asks for: the maker of handlers."""
    return make_handler


def make_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """A handler for one agent.

    Raises:
        RendezvousConnectionError: nobody listens at the endpoint, and this machine cannot.
        SystemExit: with 2, after one line on stderr, where the key cannot be used or is not that of the other nodes. torchrun would show
            30 lines for any other exception.
    """
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import DEFAULT_PORT
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    from fastbert.cluster.rendezvous import Deadline, RankLost, own_address
    from fastbert.cluster.signature import find_key
    from fastbert.cluster.torchrun_rounds import SignedRounds
    from fastbert.cluster.torchrun_state import SignedState

    def ask(work: Callable[[Any], Any]) -> Any:
        try:
            return Deadline(ANSWER_S).run(
                lambda: work(store), f"the store of --rdzv-endpoint {parameters.endpoint}"
            )
        except (RankLost, ValueError, RuntimeError, TimeoutError) as error:
            raise RendezvousConnectionError(str(error)) from None

    host, port = parse_rendezvous_endpoint(parameters.endpoint, DEFAULT_PORT)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # read by torch whenever nodes have met
    for name, value in DEFAULTS.items():
        parameters.config.setdefault(name, value)
    try:
        key = find_key()
        store, made = _store(host, port, parameters)
        state = SignedState(NAME, ask, parameters.run_id, key, made, parameters.endpoint)
    except InputError as error:
        print(f"fastbert: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    parameters.local_addr = parameters.local_addr or own_address(store.host)
    return create_handler(SignedRounds(store, key, state.start), state, parameters)


def _store(host: str, port: int, parameters: RendezvousParameters) -> tuple[TCPStore, bool]:
    """Hold the store where the endpoint's address is this machine's, unless another agent here does already; else reach it.

    Returns:
        The store, and whether this agent holds it.
    """
    from datetime import timedelta

    from torch.distributed import DistError, TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    from fastbert.cluster.rendezvous import hold_store, listens, numeric

    may_hold, timeout_s = (
        parameters.get_as_bool("is_host"),
        parameters.get_as_int("join_timeout") or JOIN_TIMEOUT_S,
    )
    read_timeout = timedelta(seconds=parameters.get_as_int("read_timeout") or READ_TIMEOUT_S)
    end, problem = time.monotonic() + timeout_s, ""
    while time.monotonic() < end:
        try:
            address = numeric(host, port)
            if may_hold is not False:
                try:
                    store = hold_store(address, port)
                    store.set_timeout(read_timeout)
                    return store, True
                except OSError as error:
                    if may_hold or error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                        raise RendezvousConnectionError(
                            f"--rdzv-endpoint {host}:{port}: cannot listen on {address}: {error}"
                        ) from None
            if listens(address, port):
                return TCPStore(address, port, None, False, timeout=read_timeout), False
            problem = f"nobody listens on {address}; is it the address of one of the nodes?"
        except (
            OSError,
            DistError,
        ) as error:  # a name that is not known yet; a store that has just ended
            problem = str(error)
        time.sleep(0.2)
    raise RendezvousConnectionError(
        f"--rdzv-endpoint {host}:{port}: after {timeout_s} s, {problem}"
    )
