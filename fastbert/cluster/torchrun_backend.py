"""`torchrun --rdzv-backend fastbert --rdzv-endpoint HOST:PORT`: torchrun's c10d rendezvous,
listening on one interface.

- Its store listens on HOST's address alone. torch's listens on every interface of the machine, and
  any process that reaches a store can end the run.
- Rank 0's worker makes the workers' store, and listens in the same way. Otherwise the agent would
  make it: TORCH_DISABLE_SHARE_RDZV_TCP_STORE.
- A lost node is noticed after 10 seconds instead of 15, and the remaining nodes wait 10 seconds for
  others instead of 30. Each is an option of `--rdzv-conf` with torch's name: keep_alive_interval,
  keep_alive_max_attempt, last_call_timeout. Much shorter times would not work: the nodes' clocks
  are compared, and a machine that is too busy to answer looks like a lost one.
- An agent that is cut off from the store gives up after 15 seconds. torch's waits until TCP gives
  up, a quarter of an hour.
- A node is known by the address from which it reaches HOST. torch uses the host's name instead,
  which often means 127.0.1.1.
- Everything that agents read from the store is signed with the run's key (signature.py). torch
  unpickles one value, the state of the rendezvous (torchrun_state.py). Without a signature, a
  stranger who reaches the port runs code here. The other values are text, JSON and counts
  (torchrun_rounds.py).

torchrun imports this module at every start, whichever backend is asked for. So heavy modules are
imported when they are used.
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

# The first and the last are in seconds, the second is a count.
DEFAULTS = {"keep_alive_interval": 2, "keep_alive_max_attempt": 5, "last_call_timeout": 10}
JOIN_TIMEOUT_S = 600  # torch's default
READ_TIMEOUT_S = 60  # torch's default
ANSWER_S = 10.0  # in addition to SILENCE_S of rendezvous.py


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return the factory of handlers that torchrun's registry asks for."""
    return make_handler


def make_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """Make the rendezvous handler of one agent.

    Raises:
        RendezvousConnectionError: nothing listens at the endpoint, and this machine cannot.
        SystemExit: with 2, after one line on stderr, where the key cannot be used or is not that of
            the other nodes. torchrun would print 30 lines for any other exception.
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
    # torch reads this variable after every rendezvous.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name, value in DEFAULTS.items():
        parameters.config.setdefault(name, value)
    try:
        key = find_key()
        store, made = _store(host, port, parameters)
        state = SignedState(ask, parameters.run_id, key, made, parameters.endpoint)
    except InputError as error:
        print(f"fastbert: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    parameters.local_addr = parameters.local_addr or own_address(store.host)
    return create_handler(SignedRounds(store, key, state.start), state, parameters)


def _store(host: str, port: int, parameters: RendezvousParameters) -> tuple[TCPStore, bool]:
    """Open the store, or connect to it.

    This agent holds the store where the endpoint is an address of this machine, unless another
    agent here already holds it.

    Returns:
        The store, and whether this agent holds it.
    """
    from datetime import timedelta

    from torch.distributed import DistError, TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    from fastbert.cluster.rendezvous import hold_store, listens, numeric

    may_hold = parameters.get_as_bool("is_host")
    timeout_s = parameters.get_as_int("join_timeout") or JOIN_TIMEOUT_S
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
        except (OSError, DistError) as error:
            # The name may not be known yet, or the store may have just ended.
            problem = str(error)
        time.sleep(0.2)
    raise RendezvousConnectionError(
        f"--rdzv-endpoint {host}:{port}: after {timeout_s} s, {problem}"
    )
