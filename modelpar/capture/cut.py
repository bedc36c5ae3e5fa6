"""A slice of a model as one stage runs it: StageProgram."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modelpar.capture.objective import call
from modelpar.planning.graph import BATCH
from modelpar.planning.plan import Plan


@dataclass
class StageProgram:
    """One stage: some layers of the user's model under their original names, and the values they take and give."""

    stage: int
    module: nn.Sequential
    """Its children are the stage's layers, so that parameters have the FQNs of the unsplit model."""
    source: str
    """Name of the value it takes."""
    result: str | None
    """Name of the value it gives; None for the last stage, whose output meets the loss."""
    result_needs_grad: bool
    """Whether the plan has its gradient come back."""
    writes_input: bool
    draws: tuple[str, ...]
    """FQNs of the modules whose own forward draws random numbers."""
    tied: dict[str, str]
    """The FQN by which this stage knows each tensor that other stages use too, by the owner's FQN."""
    copies: tuple[str, ...]
    """Those of them, by this stage's FQN, that another stage owns."""
    loss: Callable[[Any, Any], Any] | None = None
    """Only on the last stage."""

    def __call__(self, values: dict[str, Any]) -> Any:
        """Runs the layers on the values received and returns the last layer's output."""
        value = values[self.source]
        if self.writes_input:  # what another stage gave is frozen: write to a copy
            value = pytree.tree_map_only(Tensor, Tensor.clone, value)
        layers = iter(self.module._modules.values())
        if self.source == "inputs":
            value = call(next(layers), value)
        for layer in layers:
            value = layer(value)
        return value

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the trainable parameters that this stage updates, by FQN."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad and n not in self.copies}

    def failing_layer(self, traceback: TracebackType | None) -> str:
        """Returns the FQN of the innermost module on a traceback, or "the loss" where none was running."""
        names = {id(module): name for name, module in self.module.named_modules()}
        found = ""
        while traceback:
            found = names.get(id(traceback.tb_frame.f_locals.get("self")), "") or found
            traceback = traceback.tb_next
        return found or ("the loss" if self.result is None else "the stage")


def cut_stage(model: nn.Sequential, loss: Callable[[Any, Any], Any] | None, plan: Plan, stage: int) -> StageProgram:
    """Cuts one stage out of a model; the layers are the model's own, not copies."""
    layers = [plan.graph.layers[i] for i in plan.partition.layers(stage)]
    values = [v for v in plan.stage_graph.values if v.name != "targets"]
    (source,) = [v.name for v in values if stage in v.consumers]
    given = [v for v in values if v.producer == stage and v.producer != BATCH]
    last = stage == plan.num_stages - 1
    module = nn.Sequential(OrderedDict((layer.name, model._modules[layer.name]) for layer in layers))
    own = dict(module.named_parameters())
    shared = [tie for tie in plan.stage_graph.tied if stage in tie.layers]
    tied = {tie.names[0]: next(name for name in tie.names if name in own) for tie in shared}
    return StageProgram(
        stage=stage,
        module=module,
        source=source,
        result=None if last else given[0].name,
        result_needs_grad=not last and given[0].needs_grad,
        writes_input=layers[0].writes_input,
        draws=tuple(dict.fromkeys(name for layer in layers for name in layer.draws)),
        tied=tied,
        copies=tuple(tied[tie.names[0]] for tie in shared if tie.layers[0] != stage),
        loss=loss if last else None,
    )
