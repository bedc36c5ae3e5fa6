"""The whole decision: Plan. With the configuration and the weights it is enough to run again."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from modelpar.errors import ModelparError, PlanError, PlanMismatch, describe
from modelpar.planning.cluster import Cluster
from modelpar.planning.edges import Edge, edges
from modelpar.planning.graph import ModelGraph, Parameter, StageGraph
from modelpar.planning.partition import Partition
from modelpar.planning.profile import Profile
from modelpar.planning.reading import Reading
from modelpar.planning.schedule import Action, Op, Schedule

SCHEMA_VERSION = 1

ScheduleGenerator = Callable[[int, int], Schedule]
"""A function of (num_ranks, num_microbatches), such as `schedules.gpipe`."""


@dataclass(frozen=True)
class Prediction:
    """What the simulator says of a plan."""

    step_seconds: float
    bubble: float
    utilization: tuple[float, ...]
    """Per rank."""


@dataclass(frozen=True)
class Plan:
    """How a model is split, placed and scheduled. Pure data; `plan.json` holds all of it."""

    graph: ModelGraph
    profile: Profile
    cluster: Cluster
    partition: Partition
    schedule: Schedule
    generator: ScheduleGenerator | None = field(default=None, compare=False)
    """Makes the schedule of a batch with fewer samples than micro-batches; None where only one order is known."""
    num_threads: int = 1
    """Intra-op threads per rank."""
    tied: str = "fast"
    """"fast" adds the gradients of tied tensors once per step; "exact" per micro-batch, as autograd to the bit."""
    prediction: Prediction | None = None
    batch: Reading = field(default_factory=Reading)
    """Which parts of the example batch counted samples; batches are cut as it was."""
    notes: tuple[str, ...] = ()
    """What cutting batches changes, whether or not the model is split, a line each."""
    whole: str = field(default="", compare=False)
    """In a line, that micro-batches give apart what they give together, where that was seen. Not saved."""
    captured: Any = field(default=None, compare=False, repr=False)
    """What the plan was made from, (model or factory, recording), so that nobody has to record it again. Not saved."""

    def __post_init__(self) -> None:
        if self.partition.num_layers != len(self.graph.layers):
            raise PlanMismatch(
                f"the partition has {self.partition.num_layers} layers, the model {len(self.graph.layers)}"
            )
        if self.partition.num_stages != self.schedule.num_stages:
            raise PlanError(
                f"the partition has {self.partition.num_stages} stages, the schedule {self.schedule.num_stages}"
            )
        if self.cluster.num_ranks != self.schedule.num_ranks:
            raise PlanError(f"the cluster has {self.cluster.num_ranks} ranks, the schedule {self.schedule.num_ranks}")
        if self.tied not in ("fast", "exact"):
            raise PlanError(f'tied is {self.tied!r}; expected "fast" or "exact"')

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what the plan was made from, which belongs to this process."""
        return {**vars(self), "captured": None}

    @property
    def num_ranks(self) -> int:
        """How many ranks run the plan."""
        return self.schedule.num_ranks

    @property
    def num_stages(self) -> int:
        """How many stages the model is split into."""
        return self.partition.num_stages

    @property
    def num_microbatches(self) -> int:
        """How many micro-batches a full batch is cut into."""
        return self.schedule.num_microbatches

    @property
    def stage_graph(self) -> StageGraph:
        """The values between the stages."""
        return self.graph.stages(self.partition.bounds, self.tied == "exact")

    @property
    def edges(self) -> tuple[Edge, ...]:
        """How each value travels between stages."""
        return edges(self.stage_graph, self.schedule.stage_to_rank, self.cluster, self.profile.microbatch_size)

    def schedule_for(self, num_microbatches: int) -> Schedule:
        """Returns the schedule for a batch with that many micro-batches; raises PlanError where there is none."""
        if num_microbatches == self.num_microbatches:
            return self.schedule
        if self.generator is None:
            raise PlanError(
                f"the batch has {num_microbatches} micro-batches, and this plan holds only an explicit order for "
                f"{self.num_microbatches}; give a schedule function, or batches of at least that many samples"
            )
        try:
            order = self.generator(self.num_ranks, num_microbatches)
        except ModelparError:
            raise
        except Exception as error:  # it may be the user's own
            raise PlanError(f"no schedule for {num_microbatches} micro-batches: {describe(error)}") from error
        if (order.num_microbatches, order.stage_to_rank) != (num_microbatches, self.schedule.stage_to_rank):
            raise PlanError(
                f"the schedule function gave {order.num_microbatches} micro-batches and stages on the ranks "
                f"{order.stage_to_rank}; expected {num_microbatches} and {self.schedule.stage_to_rank}"
            )
        return order

    def forward_schedule(self, num_microbatches: int) -> Schedule:
        """Returns the forward-only schedule for evaluation and prediction, with the stages placed as in training."""
        stages: list[list[int]] = [[] for _ in range(self.num_ranks)]
        for stage, rank in enumerate(self.schedule.stage_to_rank):
            stages[rank].append(stage)
        microbatches = range(num_microbatches)
        return Schedule.of([[Action(s, Op.FORWARD, i) for i in microbatches for s in own] for own in stages], "forward")

    def check_model(self, graph: ModelGraph) -> None:
        """Raises PlanMismatch, listing what changed, unless the graph is the one the plan was made for."""
        if graph.hash == self.graph.hash:
            return
        ours, theirs = ({layer.name: layer for layer in g.layers} for g in (self.graph, graph))
        changes = [f"{name} is gone" for name in ours if name not in theirs]
        changes += [f"{name} is new" for name in theirs if name not in ours]
        changes += [
            f"{name} changed"
            for name in ours
            if name in theirs
            and (ours[name].kind, ours[name].parameters) != (theirs[name].kind, theirs[name].parameters)
        ]
        shown = ", ".join(changes[:8]) or "the order of layers or the tied tensors changed"
        raise PlanMismatch(f"the plan was made for another model (hash {self.graph.hash}, now {graph.hash}): {shown}")

    def check_parameters(self, parameters: Mapping[str, Parameter]) -> None:
        """Raises PlanMismatch, listing what changed, unless a model's parameters and buffers are those of the plan."""
        ours = {parameter.name: parameter for layer in self.graph.layers for parameter in layer.parameters}
        changes = []
        for layer in self.graph.layers:
            gone = [p.name for p in layer.parameters if p.name not in parameters]
            changes += [
                f"{name} is gone" for name in ([layer.name] if len(gone) == len(layer.parameters) > 0 else gone)
            ]
            if any(parameters.get(p.name, p) != p for p in layer.parameters):
                changes.append(f"{layer.name} changed")
        known = {*ours, *self.graph.parameters, *(name for tie in self.graph.tied for name in tie.names)}
        new = [name for name, p in parameters.items() if name not in known and not p.buffer]
        changes += [f"{name} is new" for name in dict.fromkeys(name.partition(".")[0] for name in new)]
        if changes:
            raise PlanMismatch(f"the plan was made for another model: {', '.join(changes[:8])}")

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for json: the schedule as its generator, or as lines of actions where there is none."""
        named = _name_of(self.generator)
        return {
            "schema_version": SCHEMA_VERSION,
            "graph_hash": self.graph.hash,
            "num_ranks": self.num_ranks,
            "num_microbatches": self.num_microbatches,
            "num_threads": self.num_threads,
            "tied": self.tied,
            "partition": self.partition.to_json(),
            "stages": [
                {
                    "stage": stage,
                    "rank": rank,
                    "layers": [self.graph.layers[i].name for i in self.partition.layers(stage)],
                }
                for stage, rank in enumerate(self.schedule.stage_to_rank)
            ],
            "edges": [asdict(edge) for edge in self.edges],
            "schedule": named if named else {"kind": self.schedule.kind, "ranks": self.schedule.lines()},
            "batch": self.batch.to_json(),
            "notes": list(self.notes),
            "prediction": None if self.prediction is None else vars(self.prediction),
            "cluster": self.cluster.to_json(),
            "profile": self.profile.to_json(),
            "graph": self.graph.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Reads what `to_json` wrote."""
        if data.get("schema_version") != SCHEMA_VERSION:
            raise PlanError(f"plan has schema version {data.get('schema_version')}; expected {SCHEMA_VERSION}")
        written, generator = data["schedule"], None
        if "generator" in written:
            generator = _generator(written["generator"], written["arguments"])
            schedule = generator(data["num_ranks"], data["num_microbatches"])
        else:
            schedule = Schedule.of(written["ranks"], written["kind"])
        prediction = data["prediction"]
        return cls(
            graph=ModelGraph.from_json(data["graph"]),
            profile=Profile.from_json(data["profile"]),
            cluster=Cluster.from_json(data["cluster"]),
            partition=Partition.from_json(data["partition"]),
            schedule=schedule,
            generator=generator,
            num_threads=data["num_threads"],
            tied=data["tied"],
            prediction=prediction
            and Prediction(prediction["step_seconds"], prediction["bubble"], tuple(prediction["utilization"])),
            batch=Reading.from_json(data.get("batch", {})),
            notes=tuple(data.get("notes", ())),
        )

    def save(self, path: str | Path) -> None:
        """Writes plan.json."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads plan.json."""
        return cls.from_json(json.loads(Path(path).read_text()))

    def with_prediction(self, prediction: Prediction) -> Plan:
        """Returns the same plan with what the simulator says of it."""
        return replace(self, prediction=prediction)


def _name_of(generator: ScheduleGenerator | None) -> dict[str, Any] | None:
    """Returns a generator as an importable name and its bound arguments, or None where json cannot hold it."""
    function: Callable[..., Any] | None = generator
    arguments: dict[str, Any] = {}
    if isinstance(generator, partial):
        if generator.args:
            return None
        function, arguments = generator.func, dict(generator.keywords)
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    try:
        kept = _import(name) is function and json.loads(json.dumps(arguments)) == arguments
    except (ImportError, AttributeError, ValueError, TypeError):
        return None
    return {"generator": name, "arguments": arguments} if kept and not name.startswith("__main__:") else None


def _generator(name: str, arguments: dict[str, Any]) -> ScheduleGenerator:
    try:
        found = _import(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlanError(f"the plan's schedule generator {name} cannot be imported: {error}") from error
    return partial(found, **arguments) if arguments else found


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
