"""Random stage graphs for hypothesis: chains, skips, values that nobody differentiates, ties; exact and fast."""

from hypothesis import strategies as st

from modelpar.planning.graph import BATCH, StageGraph, Tied, Value


@st.composite
def stage_graphs(draw: st.DrawFn, min_stages: int = 1, max_stages: int = 5) -> StageGraph:
    num_stages = draw(st.integers(min_stages, max_stages))
    values = []
    for number in range(draw(st.integers(0, 8))):
        producer = draw(st.integers(BATCH, num_stages - 1))
        later = range(producer + 1, num_stages)
        consumers = draw(st.sets(st.sampled_from(later))) if later else set()
        if not consumers and producer == BATCH:
            continue
        num_bytes, needs_grad = draw(st.integers(0, 3)), draw(st.booleans())
        values.append(Value(f"h{number}", producer, tuple(sorted(consumers)) or (BATCH,), num_bytes, needs_grad))
    tied = []
    if num_stages > 1:
        for number in range(draw(st.integers(0, 2))):
            stages = draw(st.sets(st.integers(0, num_stages - 1), min_size=2))
            tied.append(Tied((f"t{number}", f"copy{number}"), tuple(sorted(stages)), draw(st.integers(0, 3))))
    return StageGraph(num_stages, tuple(values), tuple(tied), draw(st.booleans()), draw(st.booleans()))
