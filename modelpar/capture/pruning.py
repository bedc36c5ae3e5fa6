"""Leaves out of a recording what nobody needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from modelpar.capture.recording import Node, Recording, Ref, Template
from modelpar.planning.graph import BATCH


def pruned(recording: Recording) -> Recording:
    """Leaves out functions that nobody needs, and views of changed memory that nobody looks at again."""
    nodes = recording.nodes
    wanted = {ref for template in recording.ends for ref in template.refs}
    new: dict[int, Node] = {}
    places: dict[Ref, Ref] = {}
    """Where what a node wrote to is found afterwards."""
    for number in reversed(range(len(nodes))):
        node = nodes[number]
        used = {ref.index for ref in wanted if ref.node == number}
        lasting = (node.is_module and not node.free) or node.draws or node.changes or node.check or node.lasting
        if not used and not lasting:
            continue
        arguments = len(node.writes) - node.aliases
        kept = [k for k in range(len(node.writes)) if k < arguments or -1 - k in used]
        places |= {Ref(number, -1 - k): Ref(number, -1 - at) for at, k in enumerate(kept)}
        new[number] = replace(
            node,
            writes=tuple(node.writes[k] for k in kept),
            written=tuple(node.written[k] for k in kept),
            aliases=len(kept) - arguments,
        )
        wanted |= set(new[number].takes)
    free: set[int] = {BATCH}
    uses = Counter(takes for node in new.values() for takes in {ref.node for ref in node.takes})
    for number in sorted(new):  # a module whose output only one call takes is a layer like any other
        node = new[number]
        if node.free and {ref.node for ref in node.takes} <= free and not (node.is_module and uses[number] < 2):
            free.add(number)
        new[number] = replace(node, free=number in free)
    order = {BATCH: BATCH} | {number: i for i, number in enumerate(sorted(new))}

    def moved(leaf: Any) -> Any:
        if type(leaf) is not Ref:
            return leaf
        place = places.get(leaf, leaf)
        return Ref(order[place.node], place.index)

    def template(found: Template) -> Template:
        return Template(tuple(map(moved, found.leaves)), found.spec)

    return replace(
        recording,
        nodes=tuple(
            replace(
                new[n],
                args=template(new[n].args),
                after=moved(new[n].after),
                writes=tuple(map(moved, new[n].writes)),
                touches=tuple(moved(ref) for ref in new[n].touches if ref.node in order),
            )
            for n in sorted(new)
        ),
        output=template(recording.output),
        targets=recording.targets and template(recording.targets),
        guards=tuple(replace(guard, args=template(guard.args)) for guard in recording.guards),
        together=tuple((order[i], order[j]) for i, j in recording.together if i in order and j in order),
    )
