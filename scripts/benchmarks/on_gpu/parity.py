"""Whether the split model equals the unsplit one on the same device, to the bit, with deterministic algorithms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import reference
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.on_gpu.ranks import Ranks, one_line, places
from modelpar.capture.objective import Objective
from modelpar.models import convnet, gpt, mlp
from modelpar.planner import plan
from modelpar.planning import partitioners, schedules
from modelpar.planning.result import StepResult
from modelpar.run.pipeline import Pipeline

NUM_MICROBATCHES = 4
MAX_NORM = 0.5
SIZES = (1.0, 1.0, 0.6)
"""The batches' sizes, as shares of the first: the last does not divide evenly."""
SCHEDULES = {"gpipe": schedules.gpipe, "1f1b": schedules.one_f_one_b}


class Recomputed(nn.Module):
    """Blocks with dropout that are checkpointed, and dropout of the model's own between them."""

    def __init__(self, width: int):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2), nn.Tanh())  # noqa: E731
        self.blocks, self.head, self.recomputes = nn.ModuleList(block() for _ in range(5)), nn.Linear(width, 10), True

    def forward(self, x: Tensor) -> Tensor:
        """Maps (samples, width) to (samples, 10)."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
            x = nn.functional.dropout(x, 0.1, self.training)
        return self.head(x)


def recomputed(width: int) -> Any:
    """Returns the model, an example batch and the loss."""
    batch = torch.randn(64, width), torch.randint(10, (64,))
    return Recomputed(width), batch, nn.functional.cross_entropy


# on a device large enough that values are shared, not staged: 128 KB and more per micro-batch
LARGE: dict[str, tuple[Callable[..., Any], int]] = {
    "gpt": (partial(gpt.build, vocab_size=64, context=64, width=128, depth=4, heads=4), 16),
    "mlp": (partial(mlp.build, width=2048, depth=5, dropout=0.3), 64),
    "convnet": (partial(convnet.build, input_shape=(3, 32, 32), width=16, depth=4), 16),
    "recomputed": (partial(recomputed, 2048), 64),
}
SMALL: dict[str, tuple[Callable[..., Any], int]] = {
    "gpt": (partial(gpt.build, vocab_size=32, context=8, width=16, depth=3, heads=2), 8),
    "mlp": (partial(mlp.build, input_shape=(6,), width=16, depth=4, dropout=0.3), 8),
    "convnet": (partial(convnet.build, input_shape=(3, 8, 8), width=4, depth=3), 8),
    "recomputed": (partial(recomputed, 16), 8),
}

_adamw = partial(torch.optim.AdamW, lr=1e-2)


class Training(NamedTuple):
    """What came of a few steps."""

    losses: list[float]
    norms: list[float | None]
    state: dict[str, Tensor]


def run(way: str, device: str, say: Callable[..., None]) -> None:
    """Trains every model split in 2 and 4, with every schedule; says for each whether it equals the unsplit one."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    with Ranks(way, 4) as ranks:
        for model in LARGE:
            expected: Training | None = None
            for num_ranks in (2, 4):
                for schedule in SCHEDULES:
                    case = {"check": "parity", "way": way, "model": model, "ranks": num_ranks, "schedule": schedule}
                    try:
                        decided, objective, batches = _decide(model, device, num_ranks, schedule)
                        expected = expected or _unsplit(decided, objective, batches, device)
                        found, results = _split(decided, objective, batches, ranks)
                    except Exception as error:
                        say(**case, found=f"failed: {one_line(error)}")
                        ranks.drop()
                        continue
                    say(**case, found=difference(found, expected) or "equal")
                    if overlap := overlaps(results):
                        say(check="failed", what=f"the spans of {model}, {num_ranks} ranks, {schedule}", why=overlap)


def difference(found: Training, expected: Training) -> str:
    """Says what differs, by how much at most; nothing where every bit is the same."""
    said = []
    for name in ("losses", "norms"):
        pairs = list(zip(getattr(found, name), getattr(expected, name), strict=True))
        if any(a != b for a, b in pairs):
            said.append(f"{name} by {max(abs(a - b) for a, b in pairs):.1e}")
    wrong = [name for name in expected.state if not torch.equal(found.state[name], expected.state[name])]
    if wrong:
        most = max(float((found.state[n].double() - expected.state[n].double()).abs().max()) for n in wrong)
        said.append(f"{len(wrong)} of {len(expected.state)} weights by {most:.1e}, first {wrong[0]}")
    return f"differs: {'; '.join(said)}" if said else ""


def overlaps(results: list[StepResult]) -> str:
    """Says which spans of a rank overlap, if any do."""
    for result in results:
        for rank in range(result.timeline.num_ranks):
            spans = sorted(result.timeline.of_rank(rank), key=lambda span: span[2:4])
            for a, b in pairwise(spans):
                if a.kind != "data" and a.end > b.start + 1e-6:
                    return f"{a.kind} and {b.kind} of rank {rank} overlap by {a.end - b.start:.1e} s"
    return ""


def _decide(model: str, device: str, num_ranks: int, schedule: str) -> tuple[Any, Objective, list[Any]]:
    build, size = (SMALL if device == "cpu" else LARGE)[model]
    torch.manual_seed(1)
    built, (inputs, targets), loss = build()
    batches = []
    for share in SIZES:
        rows = torch.randint(len(inputs), (round(size * share),))
        noise = torch.rand(len(rows), *inputs.shape[1:]) if inputs.is_floating_point() else 0
        batches.append((inputs[rows] + noise, targets[rows]))
    objective = Objective(built, loss)
    decided = plan(
        objective,
        batches[0],
        num_ranks=num_ranks,
        num_microbatches=NUM_MICROBATCHES,
        partitioner=partitioners.uniform,
        schedule=SCHEDULES[schedule],
        num_threads=1,
        devices=places(device, num_ranks),
        profile="flops",
        tied="exact",
    )
    return decided, objective, batches


def _split(decided: Any, objective: Objective, batches: list[Any], ranks: Ranks) -> tuple[Training, list[StepResult]]:
    with Pipeline(objective, decided, workers=ranks.get(), optimizer=_adamw, max_norm=MAX_NORM) as pipeline:
        results = [pipeline.step(batch) for batch in batches]
        state = pipeline.state_dict()
    return Training([r.loss for r in results], [r.grad_norm for r in results], state), results


def _unsplit(decided: Any, objective: Objective, batches: list[Any], device: str) -> Training:
    (place,) = places(device, 1)
    assert isinstance(objective.model, nn.Module)
    model = copy.deepcopy(objective.model).to(place)
    model.recomputes = False  # the reference keys what a forward draws; a recomputation must change nothing
    moved = [(inputs.to(place), targets.to(place)) for inputs, targets in batches]
    draws = list(dict.fromkeys(name for layer in decided.graph.layers for name in layer.draws))
    how = {"num_microbatches": NUM_MICROBATCHES, "max_norm": MAX_NORM, "draws": draws}
    steps = list(reference.train(model, objective.loss, _adamw, moved, **how))
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    return Training([step[0] for step in steps], [step[1] for step in steps], state)
