"""What a forward may change of a module besides its gradients, remembered and put back: Kept."""

from __future__ import annotations

from torch import nn

from modelpar.capture.untouched import attributes_of, put_back, put_back_values, values_of


class Kept:
    """The buffers and attributes of a module and those inside it, as they are now, hooks included.

    Lists, dicts, sets and tensors among the attributes are remembered with what they hold; of other objects only which
    they are. Without `buffers` these stay as they are when the others are put back.
    """

    def __init__(self, module: nn.Module, *, buffers: bool = True):
        self._attributes, self._values = attributes_of(module.modules()), values_of(module)
        if not buffers:
            left = {id(buffer) for buffer in module.buffers()}
            self._values = [(tensor, value) for tensor, value in self._values if id(tensor) not in left]
            self._attributes = [
                (own, before, [held for held in containers if held[0] is not own["_buffers"]])
                for own, before, containers in self._attributes
            ]

    def restore(self) -> None:
        """Puts all back; what did not change is not written to."""
        put_back(self._attributes)
        put_back_values(self._values)
