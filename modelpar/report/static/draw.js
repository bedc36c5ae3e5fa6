// Draws the lanes of one timeline on a canvas: boxes, hatched waits, micro-batch numbers, memory, the critical path.

import { visibleRange } from "./layout.js";

const FONT = "Roboto, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif";
export const font = (size, bold = false) => `${bold ? "600 " : ""}${size}px ${FONT}`;

const isWait = (look) => look.startsWith("wait");

/** Makes what painting needs: colours, and per kind of wait a hatched pattern. */
export function brushes(context, looks, colours, dark) {
  const patterns = {};
  for (const [key, look] of Object.entries(looks)) {
    if (!isWait(key)) continue;
    const tile = document.createElement("canvas");
    tile.width = tile.height = 6;
    const t = tile.getContext("2d");
    t.fillStyle = colours.paper;
    t.fillRect(0, 0, 6, 6);
    t.globalAlpha = dark ? 0.62 : 1;
    t.strokeStyle = look.colour;
    t.lineWidth = 1.8;
    t.beginPath();
    for (const shift of [-6, 0, 6]) {
      t.moveTo(shift - 1, 7);
      t.lineTo(shift + 7, -1);
    }
    t.stroke();
    patterns[key] = context.createPattern(tile, "repeat");
  }
  return { colours, looks, patterns, dark, widths: new Map() };
}

const lookOf = (brush, key) => brush.looks[key] || { name: key, letter: "?", colour: "#888888", ink: "#ffffff" };

/** Fills the boxes of one lane, and returns those with room for a label: span, x0, x1, span, …
 *
 * What is narrower than a pixel is merged into the kind that fills most of that pixel, and left out where that is less
 * than its neighbours fill. */
export function drawLane(context, spans, lane, scale, view, brush, only = null) {
  const boxes = new Map();
  const add = (look, x, width) => {
    const list = boxes.get(look);
    if (list) list.push(x, width);
    else boxes.set(look, [x, width]);
  };
  let pixel = -1;
  let within = null;
  const flush = () => {
    if (!within) return;
    const [look, seconds] = [...within].reduce((a, b) => (b[1] > a[1] ? b : a));
    if (seconds * scale.perSecond >= 0.4) add(look, pixel, 1);
    within = null;
  };
  const wide = [];
  const [first, last] = visibleRange(spans, view.from, view.to);
  for (let i = first; i < last; i += 1) {
    const span = spans[i];
    if (only && !only(span, i)) continue;
    const seconds = span[2] - span[1];
    if (seconds * scale.perSecond < 1) {
      const at = Math.floor(scale.x(span[1] + seconds / 2));
      if (at !== pixel) flush();
      pixel = at;
      within = within || new Map();
      within.set(span[0], (within.get(span[0]) || 0) + seconds);
      continue;
    }
    const x0 = Math.max(Math.round(scale.x(span[1])), scale.left - 1);
    const x1 = Math.min(Math.round(scale.x(span[2])), scale.right + 1);
    add(span[0], x0, x1 - x0);
    if (x1 - x0 >= 6 && !isWait(span[0])) wide.push(span, x0, x1);
  }
  flush();
  for (const [look, list] of boxes) {
    const plain = lookOf(brush, look).colour;
    const pattern = brush.patterns[look];
    context.fillStyle = pattern || plain;
    for (let i = 0; i < list.length; i += 2) context.fillRect(list[i], lane.y, list[i + 1], lane.height);
  }
  context.fillStyle = brush.colours.paper;
  for (let i = 0; i < wide.length; i += 3) context.fillRect(wide[i + 2] - 1, lane.y, 1, lane.height);
  return wide;
}

const NARROWEST_LABEL = 7;

/** Writes "F3" into boxes, or "3" where most of a kind are too narrow for that; a kind looks alike in all of a lane. */
export function drawLabels(context, wide, lane, brush) {
  if (lane.height < 9) return;
  const size = lane.height >= 20 ? 11 : 10;
  context.font = font(size);
  context.textAlign = "center";
  context.textBaseline = "middle";
  const styles = new Map();
  for (let i = 0; i < wide.length; i += 3) {
    const look = wide[i][0];
    if (wide[i + 2] - wide[i + 1] < NARROWEST_LABEL) continue;
    const counts = styles.get(look) || { all: 0, withLetter: 0 };
    counts.all += 1;
    if (labelWidth(context, labelOf(wide[i], brush, true), size, brush) + 3 <= wide[i + 2] - wide[i + 1])
      counts.withLetter += 1;
    styles.set(look, counts);
  }
  for (let i = 0; i < wide.length; i += 3) {
    if (wide[i + 2] - wide[i + 1] < NARROWEST_LABEL) continue;
    const { all, withLetter } = styles.get(wide[i][0]);
    const text = labelOf(wide[i], brush, withLetter >= 0.7 * all);
    if (labelWidth(context, text, size, brush) + 2 > wide[i + 2] - wide[i + 1]) continue;
    context.fillStyle = lookOf(brush, wide[i][0]).ink;
    context.fillText(text, (wide[i + 1] + wide[i + 2] - 1) / 2, lane.y + lane.height / 2 + 0.5);
  }
}

function labelOf(span, brush, letter) {
  const mark = lookOf(brush, span[0]).letter;
  if (span[4] < 0 || !/[A-Z]/.test(mark)) return mark;
  return letter ? `${mark}${span[4]}` : String(span[4]);
}

function labelWidth(context, text, size, brush) {
  const key = `${size} ${text}`;
  if (!brush.widths.has(key)) brush.widths.set(key, context.measureText(text).width);
  return brush.widths.get(key);
}

/** Draws a timeline, but not what moves with the pointer. `scene`: trace, rows, scale, view, top (bytes), critical. */
export function drawTimeline(context, scene, brush, width) {
  const { trace, rows, scale, view } = scene;
  const { colours } = brush;
  context.fillStyle = colours.paper;
  context.fillRect(0, 0, width, rows.height);
  context.save();
  context.beginPath();
  context.rect(scale.left, 0, scale.right - scale.left, rows.height);
  context.clip();
  trace.ranks.forEach((rank, i) => {
    const row = rows.ranks[i];
    const end = Math.min(scale.x(trace.makespan), scale.right);
    context.fillStyle = colours.idle;
    if (end > scale.left) context.fillRect(scale.left, row.measured.y, end - scale.left, row.measured.height);
    const predictedEnd = Math.min(scale.x(trace.predicted_makespan || trace.makespan), scale.right);
    if (row.predicted && predictedEnd > scale.left) {
      context.fillRect(scale.left, row.predicted.y, predictedEnd - scale.left, row.predicted.height);
    }
    if (row.memory) drawMemory(context, rank, row.memory, scene, brush);
    if (row.predicted) {
      context.globalAlpha = brush.dark ? 0.55 : 0.6;
      drawLane(context, rank.predicted, row.predicted, scale, view, brush);
      context.globalAlpha = 1;
    }
    drawLabels(context, drawLane(context, rank.spans, row.measured, scale, view, brush), row.measured, brush);
  });
  drawEnd(context, scene, colours);
  if (scene.critical) drawCritical(context, scene, colours);
  context.restore();
}

function drawEnd(context, { trace, rows, scale }, colours) {
  const x = Math.round(scale.x(trace.makespan));
  context.fillStyle = colours.faint;
  for (let y = 0; y < rows.height - 4; y += 5) context.fillRect(x, y, 1, 3);
}

function drawMemory(context, rank, lane, { scale, top, trace }, brush) {
  const { colours } = brush;
  const bottom = lane.y + lane.height;
  const y = (size) => bottom - Math.min(size / top, 1) * lane.height;
  const end = Math.min(scale.x(trace.makespan), scale.right + 2);
  const path = (points, closed) => {
    context.beginPath();
    points.forEach(([seconds, size], i) => {
      const x = Math.max(scale.x(seconds), scale.left - 2);
      if (i) context.lineTo(x, y(points[i - 1][1]));
      else if (closed) context.moveTo(x, bottom);
      else context.moveTo(x, y(size));
      context.lineTo(x, y(size));
    });
    context.lineTo(end, y(points[points.length - 1][1]));
    if (closed) context.lineTo(end, bottom);
  };
  if (rank.memory && rank.memory.length) {
    context.fillStyle = colours.memory;
    path(rank.memory, true);
    context.fill();
    context.strokeStyle = colours["memory-line"];
    context.lineWidth = 1;
    path(rank.memory, false);
    context.stroke();
  }
  if (rank.memory_limit && rank.memory_limit <= top) {
    context.strokeStyle = colours.limit;
    context.setLineDash([5, 3]);
    context.beginPath();
    const at = Math.round(y(rank.memory_limit)) + 0.5;
    context.moveTo(scale.left, at);
    context.lineTo(scale.right, at);
    context.stroke();
    context.setLineDash([]);
  }
  context.fillStyle = colours.grid;
  context.fillRect(scale.left, bottom - 0.5, scale.right - scale.left, 0.5);
}

/** Threads a line through the boxes that, one after the other, took the whole step. */
function drawCritical(context, { trace, rows, scale }, colours) {
  const bar = rows.many ? 2 : 3;
  context.fillStyle = context.strokeStyle = colours.critical;
  context.lineWidth = 1;
  const links = new Path2D();
  const linked = new Set(); // pixels with a link between two ranks: one is enough
  let along = null; // {rank, x0, x1}: a stretch of boxes on one rank
  let until = 0;
  const draw = ({ rank, x0, x1 }) => {
    if (x1 < scale.left || x0 > scale.right) return;
    const { y, height } = rows.ranks[rank].measured;
    context.fillRect(x0, y + height - bar, Math.max(x1 - x0, 1), bar);
  };
  const link = (from, to) => {
    const pixel = (from.rank * trace.ranks.length + to.rank) * 65536 + from.x1;
    if (linked.has(pixel) || to.x0 < scale.left || from.x1 > scale.right) return;
    linked.add(pixel);
    const [a, b] = [rows.ranks[from.rank].measured, rows.ranks[to.rank].measured];
    const down = to.rank > from.rank;
    links.moveTo(from.x1 - 0.5, a.y + a.height - (down ? 0 : bar));
    links.lineTo(from.x1 - 0.5, down ? b.y - 2 : b.y + b.height + 3);
    links.lineTo(to.x0 + 0.5, down ? b.y + b.height - bar : b.y + b.height);
  };
  for (const [rank, index] of trace.critical) {
    const [look, start, end] = trace.ranks[rank].spans[index];
    const begin = isWait(look) ? Math.min(Math.max(start, until), end) : start; // before that nothing was under way
    until = end;
    const [x0, x1] = [Math.round(scale.x(begin)), Math.round(scale.x(end))];
    if (along && along.rank === rank && x0 <= along.x1 + 1) {
      along.x1 = x1;
      continue;
    }
    const next = { rank, x0, x1 };
    if (along) {
      draw(along);
      if (along.rank !== rank) link(along, next);
    }
    along = next;
  }
  if (along) draw(along);
  context.stroke(links);
}

/** The columns at the right of the lanes, with where each ends. */
export const COLUMNS = [
  ["busy", 82],
  ["fill", 118],
  ["stall", 154],
  ["drain", 190],
];

/** Draws who a row is, at the left, and what came of it, at the right of its lanes. */
export function drawMargins(context, scene, brush, width, text) {
  const { trace, rows, scale } = scene;
  const { colours } = brush;
  const shares = trace.ranks.map((rank) => rankShare(trace, rank));
  const most = Math.max(...shares);
  context.textBaseline = "middle";
  trace.ranks.forEach((rank, i) => {
    const row = rows.ranks[i];
    const middle = row.measured.y + row.measured.height / 2 + 0.5;
    const bound = most > 0 && shares[i] === most && trace.ranks.length > 1;
    context.textAlign = "left";
    context.fillStyle = colours.critical;
    if (bound) context.fillRect(0, row.top, 3, row.bottom - row.top);
    context.fillStyle = colours.text;
    context.font = font(rows.many ? 11 : 12, bound);
    context.fillText(rank.name, 10, middle - (rows.many ? 0 : 5));
    drawShare(context, shares[i], bound, row, rows.many, colours, text);
    if (!rows.many) {
      context.font = font(9);
      context.fillStyle = colours.faint;
      context.textAlign = "right";
      const at = (lane) => lane.y + lane.height / 2 + 0.5;
      if (row.predicted) context.fillText("predicted", scale.left - 6, at(row.predicted));
      context.fillText(trace.measured ? "measured" : "predicted", scale.left - 6, at(row.measured));
      if (row.memory) context.fillText("memory", scale.left - 6, at(row.memory));
    }
    const right = scale.right;
    context.fillStyle = colours.idle;
    context.fillRect(right + 10, middle - 5, 34, 9);
    context.fillStyle = colours.accent;
    context.fillRect(right + 10, middle - 5, 34 * Math.min(rank.utilization || 0, 1), 9);
    context.fillStyle = colours.text;
    context.font = font(12, true);
    context.textAlign = "right";
    context.fillText(text.percent(rank.utilization), right + COLUMNS[0][1], middle);
    context.font = font(11);
    context.fillStyle = colours.faint;
    const waits = [rank.fill, rank.stall, rank.drain].map(text.millis);
    waits.forEach((each, column) => context.fillText(each, right + COLUMNS[column + 1][1], middle));
    context.fillStyle = colours.text;
    const peak = rank.peak_bytes ?? null;
    context.fillText(text.bytes(peak), width - 4, middle);
    if (rank.memory_limit && row.memory && !rows.many) {
      context.fillStyle = colours.faint;
      context.font = font(9.5);
      context.fillText(`of ${text.bytes(rank.memory_limit)}`, width - 4, row.memory.y + row.memory.height / 2);
    }
  });
}

/** The share of the critical path that a rank's stages hold. */
export function rankShare(trace, rank) {
  return (trace.stages || [])
    .filter((each) => rank.stages.includes(each.stage))
    .reduce((sum, each) => sum + (each.critical_share || 0), 0);
}

function drawShare(context, share, bound, row, many, colours, text) {
  const y = many ? row.measured.y + row.measured.height / 2 + 0.5 : row.measured.y + row.measured.height / 2 + 9;
  const x = many ? 62 : 10;
  context.font = font(many ? 9.5 : 10, bound);
  context.fillStyle = bound ? colours.critical : colours.faint;
  context.fillText(text.percent(share), x, y);
  context.fillStyle = colours.idle;
  context.fillRect(x + 34, y - 3, 36, 5);
  context.fillStyle = bound ? colours.critical : colours.faint;
  context.fillRect(x + 34, y - 3, 36 * Math.min(share, 1), 5);
}
