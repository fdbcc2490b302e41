"""Run tasks on a Ray cluster whose nodes share the disk; only numbers and counts travel.

The tasks of a node that is lost are done again on another one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

from fastbert.errors import InputError

# Tasks that are submitted for each core of the cluster, so that no core waits for the next one.
_AHEAD = 2

# What `make` returned in this process, for one job at a time.
_made: dict[str, Callable[[Any], Any]] = {}


def check_ray() -> None:
    """Raise InputError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError('--engine ray: Ray is missing; pip install "fastbert-pretrain[ray]"')


def map_on_ray(
    make: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    numbers: Sequence[Any],
    address: str | None = None,
) -> Generator[Any]:
    """Apply `make(*arguments)` to numbers on a cluster and yield the results in order.

    The function is made once in each worker process of Ray. The connection that this call makes is
    closed at its end; one that is there is used and stays.

    Args:
        make, arguments: picklable.
        numbers: the items, picklable.
        address: of the cluster; by default that of the environment, or a new local one.

    Raises:
        InputError: the function raised one, or the cluster was not reached.
    """
    import ray  # pyright: ignore[reportMissingImports]
    from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--ray-address {address}: no cluster there: {reason}") from None
    try:
        # A task without a limit of retries: only a lost process or node repeats it, and a second
        # try publishes the same bytes.
        task: Any = ray.remote(num_cpus=1, max_retries=-1)(_apply)
        shared = ray.put((make, arguments, os.getcwd()))
        key = shared.hex()
        waiting: dict[Any, int] = {}
        done: dict[int, Any] = {}
        source, given = enumerate(numbers), 0
        while given < len(numbers):
            cores = int(ray.cluster_resources().get("CPU", 1))
            while len(waiting) < _AHEAD * cores and (item := next(source, None)) is not None:
                waiting[task.remote(key, shared, item[1])] = item[0]
            ready, _ = ray.wait(list(waiting), num_returns=1)
            for reference in ready:
                result = ray.get(reference)
                if isinstance(result, InputError):
                    raise result
                done[waiting.pop(reference)] = result
            while given in done:
                yield done.pop(given)
                given += 1
    except RayError as error:
        reason = " ".join(str(error).split())[-500:]
        raise InputError(f"--engine ray: a task failed: {reason}") from None
    finally:
        if ours:
            ray.shutdown()


def _apply(key: str, shared: tuple[Any, tuple[Any, ...], str], number: Any) -> Any:
    """Run one task in a process of Ray's. An InputError is returned, as it is no failure of Ray."""
    if key not in _made:
        make, arguments, folder = shared
        try:
            os.chdir(folder)  # paths may be relative to where the command was called
            _made.clear()
            _made[key] = make(*arguments)
        except InputError as error:
            return error
        except OSError as error:
            return InputError(
                f"{folder}: not there on {os.uname().nodename} ({error.strerror}); "
                "the nodes must share the disk"
            )
    try:
        return _made[key](number)
    except InputError as error:
        return error
