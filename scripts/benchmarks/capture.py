"""What recording a model takes, and what replaying it costs beside the step: Hugging Face models, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from timeit import repeat
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.markdown import table
from benchmarks.options import Options
from modelpar import Objective
from modelpar.capture.capture import capture, leaf_names
from modelpar.capture.cut import cut_routine
from modelpar.capture.replay import Replay
from modelpar.capture.survey import Grain

_LOOPS = 300

TEXT = """\
*Capture*: seconds from a model to its layers, values and cuts, the check by replay included, one thread; the second of
two runs. *Replay*: what a node costs beyond the call itself (tight loop over a recording of additions of single numbers
against the same additions in Python), times the nodes, over the forward and backward of one micro-batch."""


def gpt2_small() -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns GPT-2 small with random weights, and 2 × 128 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config()), _tokens(2, 128)


def llama_96() -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns a narrow Llama of 96 layers, and 2 × 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=96,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
    )
    return LlamaForCausalLM(config), _tokens(2, 64)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Tensor]]], int]] = {
    "GPT-2 small": (gpt2_small, 4),
    "Llama, 96 narrow layers": (llama_96, 8),
}
"""Models, and for how many ranks they are recorded."""


def run(options: Options) -> str:
    """Measures all models; returns a table."""
    torch.set_num_threads(1)
    rows = []
    cost = node_seconds()
    for name, (build, num_ranks) in MODELS.items():
        options.say(f"capture: {name}")
        torch.manual_seed(0)
        model, inputs = build()
        objective, batch = Objective(model), (inputs, None)
        seconds = []
        for _ in range(2):
            start = perf_counter()
            captured = capture(objective, batch, model, num_ranks=num_ranks)
            seconds.append(perf_counter() - start)
        step = _step_seconds(model, batch)
        nodes = len(captured.recording.nodes)
        cells = [str(num_ranks), f"{seconds[-1]:.2f} s", str(len(captured.graph.layers)), str(nodes)]
        rows.append(
            [name, *cells, f"{cost * 1e6:.1f} µs", f"{step * 1e3:.0f} ms", f"{100 * nodes * cost / step:.2f} %"]
        )
    head = ["model", "ranks", "capture", "layers", "nodes", "replay of a node", "micro-batch", "replay"]
    return f"{TEXT}\n\n{table(head, rows)}"


def node_seconds(length: int = 50) -> float:
    """Returns the seconds that replaying one node takes beyond calling its function, the least of five loops."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            for _ in range(length):
                x = x + 1.0
            return x

    model, batch = Chain(), (torch.zeros(2, 1), torch.zeros(2, 1))
    objective = Objective(model, nn.functional.mse_loss)
    captured = capture(objective, batch, model, num_ranks=1, grain=Grain())
    replay = Replay(cut_routine(captured.recording, (0, len(captured.graph.layers)), 0), model)
    values = leaf_names(*batch)
    with torch.no_grad():
        replayed, called = (
            min(repeat(call, number=_LOOPS, repeat=5)) / _LOOPS
            for call in (partial(replay, values), partial(model, batch[0]))
        )
    return max(0.0, replayed - called) / (length + 1)


def _step_seconds(model: nn.Module, batch: Any) -> float:
    """Returns the median seconds of a forward and backward."""
    found = []
    for _ in range(4):
        start = perf_counter()
        model(**batch[0]).loss.backward()
        found.append(perf_counter() - start)
    return median(found)


def _tokens(samples: int, length: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, 500, (samples, length))
    return {"input_ids": tokens, "labels": tokens}
