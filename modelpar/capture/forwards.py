"""Forwards of a model, one after the other under a tape, each from where the first began: Forwards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from modelpar.capture import trees
from modelpar.capture.objective import Batch, Objective, loss_of, own_loss, run
from modelpar.capture.origins import Earlier
from modelpar.capture.parts import leaf_names
from modelpar.capture.path import ends_checkpoints
from modelpar.capture.reads import Endless, Trial
from modelpar.capture.recording import Recording, signature
from modelpar.capture.tape import Tape
from modelpar.capture.traps import Trap
from modelpar.capture.untouched import Untouched
from modelpar.errors import CaptureError, describe


@dataclass
class Forwards:
    """Runs a model, in the mode that is set, on micro-batches of one size."""

    objective: Objective
    model: nn.Module
    mode: str
    num_samples: int
    which: str
    """What the micro-batch is, for messages."""
    before: Untouched
    earlier: Earlier = field(default_factory=Earlier)
    """Knows, between forwards, which tensors they all use."""

    def again(self, microbatch: Batch, leaves: frozenset[str], trial: Trial, *, most_nodes: int) -> Recording:
        """Returns what a forward does that is given other numbers; raises Endless of more nodes than that."""
        return self._record(microbatch, Tape(self.model, leaves, self.earlier, trial, most_nodes), final=False)[0]

    def record(self, microbatch: Batch, leaves: frozenset[str], *, final: bool = False) -> tuple[Recording, Any, Any]:
        """Returns what a forward does, its output, and the targets that it was given; for `final` see `Earlier`.

        Raises Trap for what cannot be followed, and CaptureError where the model fails.
        """
        return self._record(microbatch, Tape(self.model, leaves, self.earlier), final=final)

    def _record(self, microbatch: Batch, tape: Tape, *, final: bool) -> tuple[Recording, Any, Any]:
        self.before.restore()
        self.earlier.forward_begins(final=final)
        inputs, targets = map(copy_of, microbatch)
        takes_targets = self.objective.loss is not None and self.mode != "predict"

        def forward() -> Any:
            try:
                return run(self.model, inputs)
            except (Trap, Endless):
                raise
            except Exception as error:
                if tape.trapped:  # the model's code made another error of it
                    raise tape.trapped from error
                raise CaptureError(f"{tape.failure(self.which)}: {describe(error)}") from error

        batch = leaf_names(inputs, targets if takes_targets else None)
        finish = partial(counting, self.objective, self.mode)
        with ends_checkpoints():
            recording, output = tape.record(
                forward, batch, self.num_samples, finish, targets if takes_targets else None
            )
        straight = recording.is_straight(self.model)
        made_for = signature(self.mode, microbatch[0], microbatch[1] if takes_targets else None, straight)
        return replace(recording, signature=made_for), output, targets


def counting(objective: Objective, mode: str, output: Any) -> Any:
    """Returns what counts of a model's output: its own loss, if it has one and that is asked for."""
    if objective.loss is not None or mode == "predict":
        return output
    loss = own_loss(output)
    if not isinstance(loss, Tensor) or loss.dim():
        loss_of(None, output, None, 1)  # says what is wrong
    return loss


def copy_of(tree: Any) -> Any:
    """Returns a tree with copies of its tensors."""
    return trees.map_tensors(lambda t: t.detach().clone(), tree)
