"""C++ kernels of vlmopt's operators for the CPU, compiled at first use as Inductor's own.

Where that fails, as without a C++ compiler, operators run without them, and the log says why.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from importlib.resources import files

import torch

_log = logging.getLogger("vlmopt")

_TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "float",
    torch.bfloat16: "at::BFloat16",
    torch.float16: "at::Half",
}


@functools.cache
def load(name: str, dtype: torch.dtype, *arguments: str) -> Callable[..., None] | None:
    """The function ``kernel`` of a source file, for elements of one dtype.

    Args:
        name: of the file, without ``.cpp``.
        dtype: what ``scalar_t`` stands for in it.
        arguments: types of the function's arguments: pointers, for tensors, and ``int64_t``.

    Returns:
        Nothing where there is no such dtype, and, with a warning, where it cannot be compiled.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if dtype not in _TYPES:
        return None
    source = files(__name__).joinpath(f"{name}.cpp").read_text(encoding="utf-8")
    try:
        return CppPythonBindingsCodeCache.load_pybinding(
            arguments, f"using scalar_t = {_TYPES[dtype]};\n{source}"
        )
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        _log.warning(
            "%s runs without its kernel for %s, and takes longer: %s",
            name,
            dtype,
            next(iter(str(error).split("\n")), "") or type(error).__name__,
        )
        return None
