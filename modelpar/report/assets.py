"""The JavaScript and CSS of the Pipeline view, as one text each for a page that loads nothing else.

`static/` holds plain ES modules, which TensorBoard serves as they are. Put one after the other, imported ones first,
without their imports and exports, they are one script; for that, no two modules may use the same name at top level.
"""

from __future__ import annotations

import re
from importlib import resources

STATIC = resources.files("modelpar.report") / "static"

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([^"]*)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)


def view_script(entry: str = "pipeline.js") -> str:
    """Returns `startPipelineView` and all that it needs as one script without imports."""
    order: dict[str, str] = {}

    def add(name: str) -> None:
        if name in order:
            return
        text = (STATIC / name).read_text(encoding="utf-8")
        for needed in _IMPORT.findall(text):
            add(needed)
        order[name] = _EXPORT.sub("", _IMPORT.sub("", text))

    add(entry)
    return "\n".join(order.values())


def view_style() -> str:
    """Returns the style sheet."""
    return (STATIC / "pipeline.css").read_text(encoding="utf-8")
