"""What a tape cannot follow: Trap, and how to tell the functions that make the code depend on the data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SCALARS = (bool, int, float, complex, str, bytes, type(None))

# fmt: off
DESCRIBES = frozenset((
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "is_nested", "is_mkldnn", "is_mps", "is_xpu", "requires_grad", "grad_fn", "is_leaf", "itemsize", "nbytes",
    "names", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_same_size", "get_device", "type", "len",
    "hash", "is_inference", "has_names", "is_pinned", "is_shared", "result_type", "promote_types", "can_cast",
    "is_tensor", "is_conj", "is_neg", "is_storage", "output_nr", "version", "retains_grad", "is_coalesced",
    "dense_dim", "sparse_dim", "dir", "repr", "str", "format",
))
"""Functions that tell how a tensor is made, not what is in it."""

# fmt: on

_OWN = ("torch", "modelpar")


class Trap(Exception):
    """Reports code that cannot be followed, and the module that it belongs to: "" is the model itself."""

    def __init__(self, module: str, line: str, what: str):
        super().__init__(f"{what} ({line})" if line else what)
        self.module, self.line, self.what = module, line, what


def is_plain(value: Any) -> bool:
    """Tells whether a value is a number, a string or None, or a list or tuple of these."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return isinstance(value, SCALARS)


def code_line() -> str:
    """Returns where the model's code is: the innermost frame that is neither torch's nor modelpar's."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in _OWN or module.startswith("modelpar.models"):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
