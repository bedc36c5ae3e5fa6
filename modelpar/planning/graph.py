"""What is to be split: layers in execution order, the values between them, and the legal cuts.

::

    layers     embed ──▶ h0 ──▶ h1 ──▶ head          ModelGraph: one Value per arrow
    cuts             1       2      3                 a cut c separates layers[:c] from layers[c:]
    stages     [ embed    h0 ] ──▶ [ h1    head ]     StageGraph: the same values between stages
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

BATCH = -1
"""Stands for the batch: the producer of inputs and targets, and the consumer of predictions."""


@dataclass(frozen=True)
class Parameter:
    """One parameter or buffer as the user's model names it."""

    name: str
    """FQN in the user's model."""
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    buffer: bool = False


@dataclass(frozen=True)
class Layer:
    """One node in execution order: a module that is called whole."""

    name: str
    """FQN in the user's model."""
    kind: str
    """Class name, for people."""
    parameters: tuple[Parameter, ...] = ()
    """Its parameters and buffers in the model's own order; a tied one is listed by every layer that uses it."""
    draws: tuple[str, ...] = ()
    """FQNs of the modules inside it whose own forward draws random numbers."""
    modules: tuple[str, ...] = ()
    """FQNs of the modules it calls whole: its own, and those that only depend on the batch and that others call too."""


@dataclass(frozen=True)
class Value:
    """What one layer hands to others; any pytree."""

    name: str
    producer: int
    """Index of the producing layer, or BATCH."""
    consumers: tuple[int, ...]
    """Indices of the consuming layers in ascending order, or (BATCH,)."""
    bytes_per_sample: float = 0.0
    needs_grad: bool = True


@dataclass(frozen=True)
class Tied:
    """One tensor that several layers use under several names."""

    names: tuple[str, ...]
    """Its FQNs in the order of `model.named_parameters(remove_duplicate=False)`; the first one owns it."""
    layers: tuple[int, ...]
    """Indices of the layers that use it, ascending."""
    bytes: int = 0


@dataclass(frozen=True)
class ModelGraph:
    """Layers in execution order and the values between them."""

    layers: tuple[Layer, ...]
    values: tuple[Value, ...]
    cuts: tuple[int, ...]
    """Legal cut positions, ascending: c in 1 … len(layers) − 1 separates layers[:c] from layers[c:]."""
    tied: tuple[Tied, ...] = ()
    parameters: tuple[str, ...] = ()
    """FQNs of all parameters in the order of `model.parameters()`, each tensor once."""
    straight: bool = False
    """Whether the model is an nn.Sequential of its layers: what it does then depends on no shape or value."""
    obstacles: tuple[str, ...] = ()
    """Why there are no more layers and cuts, for people: what code cannot be followed or must stay together."""

    @property
    def hash(self) -> str:
        """Identifies the structure: layer names, classes, parameter shapes and dtypes, ties; never sizes of values."""
        structure = [[layer.name, layer.kind, [asdict(p) for p in layer.parameters]] for layer in self.layers]
        text = json.dumps([structure, [tie.names for tie in self.tied]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def crossing_bytes(self, cut: int) -> float:
        """Returns the bytes per sample that cross a cut forward; their gradients weigh the same backward."""
        return sum(
            value.bytes_per_sample
            for value in self.values
            if value.producer != BATCH and value.producer < cut <= max(value.consumers)
        )

    def stages(self, bounds: Sequence[int], tied_exact: bool = False) -> StageGraph:
        """Returns the values between the stages layers[bounds[s]:bounds[s + 1]]; values inside a stage vanish."""
        stage_of = {i: s for s in range(len(bounds) - 1) for i in range(bounds[s], bounds[s + 1])} | {BATCH: BATCH}
        values = []
        for value in self.values:
            producer = stage_of[value.producer]
            consumers = tuple(sorted({stage_of[c] for c in value.consumers} - ({producer} - {BATCH})))
            if consumers:
                values.append(Value(value.name, producer, consumers, value.bytes_per_sample, value.needs_grad))
        tied = []
        for tie in self.tied:
            stages = tuple(sorted({stage_of[i] for i in tie.layers}))
            if len(stages) > 1:
                tied.append(Tied(tie.names, stages, tie.bytes))
        return StageGraph(len(bounds) - 1, tuple(values), tuple(tied), tied_exact)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelGraph:
        """Reads what `to_json` wrote."""
        layers = tuple(
            Layer(
                name=layer["name"],
                kind=layer["kind"],
                parameters=tuple(Parameter(**{**p, "shape": tuple(p["shape"])}) for p in layer["parameters"]),
                draws=tuple(layer["draws"]),
                modules=tuple(layer["modules"]),
            )
            for layer in data["layers"]
        )
        values = tuple(Value(**{**value, "consumers": tuple(value["consumers"])}) for value in data["values"])
        tied = tuple(Tied(tuple(tie["names"]), tuple(tie["layers"]), tie["bytes"]) for tie in data["tied"])
        parameters, obstacles = tuple(data["parameters"]), tuple(data.get("obstacles", ()))
        return cls(layers, values, tuple(data["cuts"]), tied, parameters, data["straight"], obstacles)


@dataclass(frozen=True)
class StageGraph:
    """The values between stages. In its Values and Ties, indices are stages instead of layers."""

    num_stages: int
    values: tuple[Value, ...]
    tied: tuple[Tied, ...] = ()
    tied_exact: bool = False
    """Whether gradients of tied tensors are added per micro-batch, as autograd does, instead of once per step."""
    clips: bool = False
    """Whether every stage needs the norm of all gradients before its update."""

    @classmethod
    def chain(cls, num_stages: int, bytes_per_sample: float = 0.0) -> StageGraph:
        """Returns the plain pipeline: each stage feeds the next one; the last also takes the targets."""
        last = num_stages - 1
        between = [Value(f"v{s}", s, (s + 1,), bytes_per_sample) for s in range(last)]
        inputs = Value("inputs", BATCH, (0,), 0.0, needs_grad=False)
        targets = Value("targets", BATCH, (last,), 0.0, needs_grad=False)
        return cls(num_stages, (inputs, *between, targets))
