"""The page of scripts/gpu_check, made of what its parts found."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import torch

from benchmarks.markdown import table

Finding = dict[str, Any]
"""What a part said: its "check" is "parity", "step" or "failed"."""


def is_equal(findings: Sequence[Finding]) -> bool:
    """Tells whether every comparison with the unsplit model was made and found every bit the same."""
    parts = [finding for finding in findings if finding["part"].startswith("parity")]
    return all(finding["check"] == "parity" and finding["found"] == "equal" for finding in parts)


def write(findings: Sequence[Finding], device: str, words: Sequence[str], seconds: float) -> str:
    """Returns the page."""
    parity = [finding for finding in findings if finding["check"] == "parity"]
    steps = [finding for finding in findings if finding["check"] == "step"]
    failed = [f"{each['what']}: {each['why']}" for each in findings if each["check"] == "failed"]
    failed += [f"{_case(each)}: {each['found']}" for each in parity if each["found"] != "equal"]
    parts = [
        "# modelpar on GPUs" if device == "cuda" else "# modelpar on the CPU, to try the script",
        _head(device, words, seconds),
        "## The same bits as the unsplit model\n\n" + _parity(parity),
        "## Milliseconds per step\n\n" + _steps(steps),
        "## Peak memory per stage, MB\n\n" + _memory(steps),
        "## Failed or not run\n\n" + ("\n".join(f"* {line}" for line in failed) or "Nothing."),
    ]
    return "\n\n".join(parts) + "\n"


def _head(device: str, words: Sequence[str], seconds: float) -> str:
    lines = [f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, took {seconds:.0f} s"]
    if device == "cuda":
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            lines.append(
                f"cuda:{i}: {found.name}, {found.total_memory / 1e9:.0f} GB, {found.multi_processor_count} SMs"
            )
    lines.append(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")
    lines.append(f"{os.cpu_count()} cores, {platform.system()} {platform.release()}")
    settings = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(("CUDA_", "PYTORCH_"))]
    lines += [", ".join(settings)] if settings else []
    return "\n".join(f"* {line}" for line in [*lines, f"`{shlex.join(['scripts/gpu_check', *words])}`"])


def _parity(findings: Sequence[Finding]) -> str:
    if not findings:
        return "Not compared."
    models = list(dict.fromkeys(each["model"] for each in findings))
    found = {(each["way"], each["ranks"], each["schedule"], each["model"]): each["found"] for each in findings}
    keys = list(dict.fromkeys(key[:3] for key in found))
    rows = [
        [way, str(ranks), schedule, *(found.get((way, ranks, schedule, model), "–") for model in models)]
        for way, ranks, schedule in keys
    ]
    return (
        "Losses, gradient norms, weights and buffers after 3 steps, with deterministic algorithms, by `torch.equal`: "
        f"{sum(each['found'] == 'equal' for each in findings)} of {len(findings)} equal.\n\n"
        + table(["values", "ranks", "schedule", *models], [[cell.split(":")[0] for cell in row] for row in rows])
    )


def _steps(findings: Sequence[Finding]) -> str:
    if not findings:
        return "Not measured."
    whole = {(each["model"], each["who"]): each["seconds"] for each in findings if each["who"].startswith("unsplit")}
    split = [each for each in findings if not each["who"].startswith("unsplit")]
    contenders = list(dict.fromkeys(each["who"] for each in split))
    alone = list(dict.fromkeys(who for _, who in whole))
    seconds = {(each["model"], each["schedule"], each["who"]): each for each in split}
    rows = []
    for model, schedule in dict.fromkeys((each["model"], each["schedule"]) for each in split):
        row = [seconds.get((model, schedule, who)) for who in contenders]
        cells = [_milliseconds(each and each["seconds"]) + _expected(each) for each in row]
        rows.append([model, schedule, *cells, *(_milliseconds(whole.get((model, who))) for who in alone)])
    text = (
        "Medians; 2 ranks, 8 micro-batches. In brackets what was predicted, and the bubble, from the devices' events."
        "\n\n"
    )
    return text + table(["model", "schedule", *contenders, *alone], rows)


def _memory(findings: Sequence[Finding]) -> str:
    rows = []
    for each in findings:
        counted = each["who"] == "modelpar threads"  # threads that share a device cannot be told apart
        if counted or each["model"] == "near empty" or not any(each.get("peaks", ())):
            continue
        expected = each.get("predicted_bytes")
        errors = "–"
        if expected and all(each["peaks"]):
            pairs = zip(expected, each["peaks"], strict=True)
            errors = ", ".join(f"{100 * (a / b - 1):+.0f} %" for a, b in pairs)
        cells = [_megabytes(expected) if expected else "–", _megabytes(each["peaks"]), errors]
        rows.append([each["model"], each["schedule"], each["who"], each.get("balance", "–"), *cells])
    head = ["model", "schedule", "who", "balance", "predicted", "measured", "error"]
    return "By max_memory_allocated of each rank's process.\n\n" + table(head, rows) if rows else "Not measured."


def _case(each: Finding) -> str:
    return f"{each['way']}, {each['model']}, {each['ranks']} ranks, {each['schedule']}"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.1f}"


def _expected(each: Finding | None) -> str:
    if not each or "bubble" not in each:
        return ""
    return f" ({_milliseconds(each['predicted_seconds'])}, {each['bubble']:.0%})"


def _megabytes(values: Sequence[int]) -> str:
    return ", ".join(f"{value / 1e6:.0f}" for value in values)
