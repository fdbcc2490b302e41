"""Every kernel with the types, constants and alignments that it has in training.

Triton compiles a kernel again for each of these. They are recorded from calls of the public
functions, whose launches are caught (`no_launch.py`), so that nothing is listed by hand.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from triton.compiler import ASTSource

from benchmarks.compiled.no_launch import no_launch
from benchmarks.kernels.cases import Case, arguments, call, leaves
from fastbert_kernels._launch import Launch, recording


class AotSignature(NamedTuple):
    """One kernel at one configuration that it has in training."""

    kernel: Any  # the @triton.jit function
    table: str  # its name in tiles.json
    size: int  # its row there
    dtype: torch.dtype
    # Name to Triton type ("*bf16", "i32", ...), or to the value of a constant; the values of the
    # tile come from the table.
    arguments: dict[str, Any]
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16; pointers always are
    wide: tuple[str, ...] = ()  # pointers whose loads must be 128 bits wide


_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*u1",
}


def training_calls() -> Iterator[Case]:
    """BERT's and ModernBERT's operations on a few tokens, with dropout and without.

    They have the sizes of base and large.

    Triton compiles for the values of the constants, among them D, H and K, and for whether an
    integer is a multiple of 16. T and M do not matter. V = 314 is no multiple of 16, like 30,522.
    """
    for lengths, p in itertools.product(([40, 128], [200, 30]), (0.0, 0.1)):
        yield Case("attention", "", {"lengths": lengths, "H": 12, "K": 64}, p)
        yield Case("attention", "", {"lengths": lengths, "H": 12, "K": 64, "window": 64}, p)
    for D in (768, 1024):
        for p in (0.0, 0.1):
            yield Case("embedding", "", {"T": 40, "V": 314, "P": 512, "D": D}, p)
        yield Case("embedding", "", {"T": 40, "V": 314, "D": D})
        yield Case("gelu", "", {"T": 40, "F": 4 * D})
    for F in (1152, 2624):
        yield Case("geglu", "", {"T": 40, "F": F})
        yield Case("geglu", "", {"T": 40, "F": F, "bare": 1})
    for H in (12, 16):
        yield Case("rotary", "", {"lengths": [40], "H": H, "K": 64})
    for D in (768, 1024):
        yield Case("mlm_loss", "", {"T": 40, "M": 20, "D": D, "V": 314})
        yield Case("mlm_loss", "all", {"T": 40, "M": 40, "D": D, "V": 314})
        for p in (0.1, 0.0):
            yield Case("norm", "", {"T": 40, "D": D}, p)
        yield Case("norm", "alone", {"T": 40, "D": D, "bare": 1})
        for p in (0.1, 0.0):
            yield Case("add_norm", "", {"T": 40, "D": D}, p)
        yield Case("add_norm", "", {"T": 40, "D": D, "bare": 1})


def launch(case: Case, dtype: torch.dtype) -> None:
    """Run the forward and the backward pass on the CPU's tensors."""
    given = arguments(case, dtype, torch.device("cpu"))
    if case.label == "all":  # every token is masked, as in the model's head
        given["positions"] = None
    result = call(case, given, "triton")
    torch.autograd.grad(result, leaves(case, given), torch.ones_like(result))


def signature_of(launched: Launch) -> AotSignature:
    """What Triton would compile for these arguments (`_launch.py` says what it looks at)."""
    kernel, size, dtype, given = launched
    found, aligned = {}, []
    for parameter in kernel.function.params:
        name, value = parameter.name, given.get(parameter.name)
        if name not in given:
            continue  # comes from the tile
        if parameter.is_constexpr or value is None:
            found[name] = value
        elif isinstance(value, torch.Tensor):
            if value.data_ptr() % 16:
                raise ValueError(f"{kernel.table}: {name} is not aligned to 16 bytes")
            found[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            found[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            found[name] = value
        else:
            found[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
    wide = tuple(name for name in kernel.wide if found[name] is not None)
    return AotSignature(kernel.function, kernel.table, size, dtype, found, tuple(aligned), wide)


@functools.cache
def aot_signatures() -> dict[str, AotSignature]:
    """Every kernel as training launches it, recorded from `training_calls`, by name.

    A name has the operation, the function, the dtype and the size, and where these are not enough
    the values of constants (but for None), and then the tensors that are missing.
    """
    alike: dict[str, list[AotSignature]] = defaultdict(list)
    cases = sorted(training_calls(), key=lambda case: case.operation)
    with no_launch("sm_90"):
        for case, dtype in itertools.product(cases, (torch.bfloat16, torch.float32)):
            with recording() as launches:
                launch(case, dtype)
            for one in map(signature_of, launches):
                name = f"{case.operation}.{one.kernel.__name__} {short(one)} {one.size}"
                if one not in alike[name]:
                    alike[name].append(one)

    named = {}
    for name, signatures in alike.items():
        telling = [
            key
            for key in signatures[0].arguments
            if len({str(one.arguments[key]) for one in signatures}) > 1
        ]
        constants = [key for key in telling if not key.endswith("_ptr")]
        if len({tuple(one.arguments[key] for key in constants) for one in signatures}) == len(
            signatures
        ):
            telling = constants
        for one in signatures:
            told = [
                f"{key}={one.arguments[key]}"
                for key in telling
                if not str(one.arguments[key]).startswith("*")
                and (key.endswith("_ptr") or one.arguments[key] is not None)
            ]
            named[" ".join([name, *told])] = one
    if len(named) != sum(map(len, alike.values())):
        raise ValueError("two signatures have one name")
    return named


def one_form_of_each(signatures: dict[str, AotSignature]) -> dict[str, AotSignature]:
    """Of each kernel in bf16 the form that does most: the fewest tensors and switches are missing.

    Among equals it is the first.
    """
    chosen: dict[str, str] = {}
    for name, one in signatures.items():
        kernel = name.split()[0]
        if one.dtype == torch.bfloat16 and (
            kernel not in chosen or missing(one) < missing(signatures[chosen[kernel]])
        ):
            chosen[kernel] = name
    return {name: signatures[name] for name in chosen.values()}


def missing(signature: AotSignature) -> int:
    return sum(value is None or value is False for value in signature.arguments.values())


def short(signature: AotSignature) -> str:
    """The name of the dtype: "bf16" or "fp32"."""
    return (
        str(signature.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    )


def source(signature: AotSignature, options: dict[str, Any]) -> ASTSource:
    """The kernel with its argument types, its constants and its alignments.

    The constants are its own and those of the tile. The alignments say which arguments are
    multiples of 16.
    """
    given = signature.arguments | {
        key: value for key, value in options.items() if key in signature.kernel.arg_names
    }
    types, constexprs, divisible = {}, {}, {}
    for index, parameter in enumerate(signature.kernel.params):
        value = given.pop(parameter.name)
        if parameter.is_constexpr or not isinstance(value, str):
            types[parameter.name], constexprs[parameter.name] = "constexpr", value
            continue
        types[parameter.name] = value
        if parameter.name in signature.aligned and parameter.do_not_specialize:
            raise ValueError(
                f"aligned names {parameter.name}, which the kernel does not specialise, so a "
                "launch would ignore its alignment"
            )
        if value.startswith("*") or parameter.name in signature.aligned:
            divisible[(index,)] = [["tt.divisibility", 16]]
    if given:
        raise ValueError(f"the kernel has no argument {', '.join(given)}")
    return ASTSource(signature.kernel, types, constexprs, divisible)
