"""Counts floating-point operations: Flops.

torch's FlopCounterMode follows modules by hooks, which fail on torch.autograd.grad and on expanded parameters.
"""

from __future__ import annotations

import logging
from typing import Any

from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_log = logging.getLogger(__name__)


class Flops(TorchDispatchMode):
    """Adds up the operations of all operators that run meanwhile, by torch's own formulas."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            return NotImplemented
        with self:  # in inference mode operators arrive that are made of others
            if (output := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                return output
        output = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            try:
                self.total += int(formula(*args, **(kwargs or {}), out_val=output))
            except Exception as error:  # a formula that does not know such arguments
                _log.debug("the operations of %s are not counted: %s", func, error)
        return output
