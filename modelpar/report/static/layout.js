// Where things are: pure functions from a trace and a width to pixels, and back.

export const LEFT = 148;
export const RIGHT = 262;

/** Rows of a timeline in pixels from its top: {height, ranks: [{top, bottom, predicted, measured, memory}]}.
 * Each lane is {y, height}, or null where the trace has nothing for it. */
export function rowsOf(trace) {
  const many = trace.ranks.length > 8;
  const sizes = many
    ? { predicted: 5, measured: 15, memory: 9, gap: 6 }
    : { predicted: 9, measured: 25, memory: 19, gap: 11 };
  const predicted = trace.ranks.some((rank) => rank.predicted && rank.predicted.length);
  const memory = trace.ranks.some((rank) => rank.memory && rank.memory.length);
  let y = 4;
  const ranks = trace.ranks.map(() => {
    const row = { top: y, predicted: null, measured: null, memory: null };
    if (predicted) {
      row.predicted = { y, height: sizes.predicted };
      y += sizes.predicted + 1;
    }
    row.measured = { y, height: sizes.measured };
    y += sizes.measured + 2;
    if (memory) {
      row.memory = { y, height: sizes.memory };
      y += sizes.memory;
    }
    row.bottom = y;
    y += sizes.gap;
    return row;
  });
  return { ranks, height: y - sizes.gap + 8, many };
}

/** The scale of a view {from, to} (seconds) on a canvas of some width: seconds to pixels and back. */
export function scaleOf(view, width) {
  const right = Math.max(width - RIGHT, LEFT + 40);
  const perSecond = (right - LEFT) / Math.max(view.to - view.from, 1e-12);
  return {
    left: LEFT,
    right,
    perSecond,
    x: (seconds) => LEFT + (seconds - view.from) * perSecond,
    seconds: (x) => view.from + (x - LEFT) / perSecond,
  };
}

/** The part [first, last) of spans, in order and without overlap, that touches from … to. */
export function visibleRange(spans, from, to) {
  return [firstWhere(spans, (span) => span[2] >= from), firstWhere(spans, (span) => span[1] > to)];
}

function firstWhere(items, holds) {
  let low = 0;
  let high = items.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (holds(items[middle])) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** The span at a moment, or the nearest within `slack` seconds; -1 where there is none. */
export function spanAt(spans, seconds, slack) {
  const after = firstWhere(spans, (span) => span[2] > seconds);
  let best = -1;
  let distance = slack;
  for (const index of [after - 1, after]) {
    if (index < 0 || index >= spans.length) continue;
    const [, start, end] = spans[index];
    const away = Math.max(start - seconds, seconds - end, 0);
    if (away < distance || (away === 0 && best < 0) || (away === 0 && index === after)) {
      best = index;
      distance = away;
    }
  }
  return best;
}

/** What lies at a point: {rank, lane: "spans" | "predicted" | "memory", index}, or null. `rank` is a row's index. */
export function hit(trace, rows, scale, x, y) {
  if (x < scale.left - 2 || x > scale.right + 2) return null;
  const row = rows.ranks.findIndex((each) => y >= each.top && y < each.bottom);
  if (row < 0) return null;
  const lanes = rows.ranks[row];
  const seconds = scale.seconds(x);
  const inside = (lane) => lane && y < lane.y + lane.height + 1;
  if (lanes.predicted && inside(lanes.predicted)) {
    const index = spanAt(trace.ranks[row].predicted, seconds, 3 / scale.perSecond);
    return index < 0 ? null : { rank: row, lane: "predicted", index };
  }
  if (inside(lanes.measured)) {
    const index = spanAt(trace.ranks[row].spans, seconds, 3 / scale.perSecond);
    return index < 0 ? null : { rank: row, lane: "spans", index };
  }
  return lanes.memory ? { rank: row, lane: "memory", index: -1 } : null;
}

/** Moments in view, 1, 2 or 5 times a power of ten and at least `pixels` apart; and their decimals in ms. */
export function ticksOf(scale, view, pixels = 78) {
  const least = pixels / scale.perSecond;
  const power = 10 ** Math.floor(Math.log10(least));
  const distance = [1, 2, 5, 10].map((base) => base * power).find((each) => each >= least);
  const decimals = Math.max(0, -Math.floor(Math.log10(distance * 1e3) + 1e-9));
  const ticks = [];
  for (let i = Math.ceil(view.from / distance - 1e-9); i * distance <= view.to; i += 1) ticks.push(i * distance);
  return { ticks, decimals };
}

/** The bytes at a moment of a step function [[seconds, bytes], …]; null before its first entry. */
export function bytesAt(memory, seconds) {
  const after = firstWhere(memory, (entry) => entry[0] > seconds);
  return after ? memory[after - 1][1] : null;
}

/** How many bytes the top of the memory lanes stands for: the largest of all, and the limit where it is near. */
export function memoryTop(traces) {
  let most = 0;
  let limit = 0;
  for (const trace of traces) {
    for (const rank of trace.ranks) {
      for (const [, size] of rank.memory || []) most = Math.max(most, size);
      for (const [, size] of rank.predicted_memory || []) most = Math.max(most, size);
      if (rank.memory_limit) limit = Math.max(limit, rank.memory_limit);
    }
  }
  return limit && limit <= 2.5 * most ? Math.max(limit, most) * 1.06 : most * 1.06 || 1;
}
