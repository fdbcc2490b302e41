"""Triton's front end alone: a kernel's Python source becomes Triton's first intermediate code.

Here the compiler rejects what the interpreter accepts: types that differ between branches, None in
a tuple, operations that do not exist. It takes about 60 ms for a kernel; machine code takes a
second. The result does not depend on the architecture, nor on the number of warps and stages.
"""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend


def front_end(
    function: Any, signature: dict[str, str], constants: dict[tuple[int, ...], Any], capability: int
) -> None:
    """Check one kernel for one kind of arguments.

    Args:
        function: the @triton.jit function.
        signature: by argument, its Triton type ("*bf16", "i32", "constexpr", ...).
        constants: the values of its constants, by their index among the arguments.
        capability: of the GPU, such as 90.

    Raises:
        Triton's own errors.
    """
    backend: Any = make_backend(GPUTarget("cuda", capability, 32))
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    ASTSource(function, signature, constants).make_ir(
        backend.target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
