"""Memory that nobody has written: which elements of torch.empty's tensors hold a value by now.

Inside `Fresh()`, tensors from torch.empty, empty_like, empty_strided, new_empty and
new_empty_strided are listed, and filled with NaN or the largest integer. The sanitizer marks what
kernels store. What torch itself writes is recognised by the tensor's version counter, which kernels
leave alone: torch has then written something, and all of the tensor counts as written. Below
autograd (as in `torch.library.opcheck`) torch does not count; elements whose value has changed are
written, too.
"""

# pyright: basic
# torch's version counters are not public.

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

FACTORIES = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


class Fresh:
    """The tensors that were allocated without a value, for the time of a `with` block."""

    def __init__(self) -> None:
        # By the address of the storage: the storage, the version at which it was allocated, and
        # which elements are written. An entry goes with its storage.
        self._known: dict[int, tuple[weakref.ref[Any], int, NDArray[Any]]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Fresh":
        for owner, name in FACTORIES:
            allocate = self._listed(getattr(owner, name))
            self._stack.enter_context(mock.patch.object(owner, name, allocate))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _listed(self, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def listed(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.numel():
                poison(tensor)
                storage = tensor.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes() // tensor.element_size()
                gone = weakref.ref(storage, lambda _: self._known.pop(address, None))
                if not tensor.is_inference():  # which has no version counter
                    self._known[address] = gone, tensor._version, np.zeros(size, bool)
            return tensor

        return listed

    def written(self, tensor: torch.Tensor) -> NDArray[Any] | None:
        """Which elements of the tensor's storage have a value; None if all have."""
        entry = self._known.get(tensor.untyped_storage().data_ptr())
        if entry is None:
            return None
        _, version, written = entry
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.is_inference() or tensor._version != version or len(written) != size:
            return None
        whole = tensor.detach().as_strided((size,), (1,), 0)
        written |= ~_is_poison(whole).numpy()
        return written

    def missing(self, tensor: torch.Tensor) -> int:
        """How many elements of the tensor nobody has written."""
        written = self.written(tensor)
        if written is None or not tensor.numel():
            return 0
        have = torch.from_numpy(written).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        return int(have.numel() - have.count_nonzero())


def _poison_of(dtype: torch.dtype) -> Any:
    """NaN, True or the largest integer."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _is_poison(data: torch.Tensor) -> torch.Tensor:
    value = _poison_of(data.dtype)
    return data.isnan() if value != value else data == value


def poison(tensor: torch.Tensor) -> None:
    """Fill with `_poison_of` the dtype, without raising the version counter."""
    with torch.no_grad():
        data, value = tensor.detach(), _poison_of(tensor.dtype)
        if data.is_inference():
            data.fill_(value)
        else:
            preserved: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore
            with preserved(data):
                data.fill_(value)
