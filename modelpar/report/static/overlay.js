// Draws what moves with the pointer, above a timeline: one micro-batch and its arrows, the cursor, a measured span.

import { drawLabels, drawLane, font } from "./draw.js";

/** `pointer`: followed {microbatch, lane}, hovered {rank, lane, index}, cursor (seconds), measure; or null. */
export function drawOverlay(context, scene, brush, width, pointer) {
  const { rows, scale } = scene;
  const { colours } = brush;
  context.clearRect(0, 0, width, rows.height);
  context.save();
  context.beginPath();
  context.rect(scale.left, 0, scale.right - scale.left, rows.height);
  context.clip();
  if (pointer.followed) drawFollowed(context, scene, brush, pointer.followed);
  if (pointer.hovered) drawHovered(context, scene, colours, pointer.hovered);
  if (pointer.measure) drawMeasure(context, scene, colours, pointer.measure);
  if (pointer.cursor !== null) {
    context.fillStyle = colours.text;
    context.globalAlpha = 0.35;
    context.fillRect(Math.round(scale.x(pointer.cursor)), 0, 1, rows.height);
  }
  context.restore();
}

function drawFollowed(context, scene, brush, { microbatch, lane }) {
  const { trace, rows, scale, view } = scene;
  context.fillStyle = brush.colours.paper;
  context.globalAlpha = 0.78;
  context.fillRect(scale.left, 0, scale.right - scale.left, rows.height);
  context.globalAlpha = 1;
  const mine = (span) => span[4] === microbatch;
  trace.ranks.forEach((rank, i) => {
    const row = rows.ranks[i];
    if (row.predicted) drawLane(context, rank.predicted, row.predicted, scale, view, brush, mine);
    drawLabels(context, drawLane(context, rank.spans, row.measured, scale, view, brush, mine), row.measured, brush);
  });
  drawArrows(context, scene, brush.colours, microbatch, lane);
}

/** The way of a micro-batch's values, each from the end of the box that sent it to the box that used it. */
function drawArrows(context, { trace, rows, scale }, colours, microbatch, lane) {
  const [arrows, part] = lane === "predicted" ? [trace.predicted_arrows, "predicted"] : [trace.arrows, "measured"];
  const spansOf = (rank) => trace.ranks[rank][lane === "predicted" ? "predicted" : "spans"];
  context.strokeStyle = context.fillStyle = colours.text;
  context.lineWidth = 1.25;
  for (const [fromRank, fromSpan, toRank, toSpan] of arrows || []) {
    const [source, target] = [spansOf(fromRank)[fromSpan], spansOf(toRank)[toSpan]];
    if (!source || !target || target[4] !== microbatch || fromRank === toRank) continue;
    const [a, b] = [rows.ranks[fromRank][part], rows.ranks[toRank][part]];
    if (!a || !b) continue;
    const down = toRank > fromRank;
    const [x0, y0] = [scale.x(source[2]), down ? a.y + a.height : a.y];
    const [x1, y1] = [scale.x(target[1]), down ? b.y : b.y + b.height];
    const bend = Math.max(Math.abs(x1 - x0) / 2, 6);
    context.beginPath();
    context.moveTo(x0, y0);
    context.bezierCurveTo(x0, y0 + (down ? bend : -bend) * 0.6, x1, y1 - (down ? 14 : -14), x1, y1);
    context.stroke();
    context.beginPath();
    context.moveTo(x1, y1);
    context.lineTo(x1 - 3.5, y1 - (down ? 6 : -6));
    context.lineTo(x1 + 3.5, y1 - (down ? 6 : -6));
    context.fill();
  }
}

function drawHovered(context, { trace, rows, scale }, colours, { rank, lane, index }) {
  const part = rows.ranks[rank][lane === "predicted" ? "predicted" : "measured"];
  const span = trace.ranks[rank][lane] && trace.ranks[rank][lane][index];
  if (!span || !part) return;
  const [x0, x1] = [Math.round(scale.x(span[1])), Math.round(scale.x(span[2]))];
  context.strokeStyle = colours.text;
  context.lineWidth = 2;
  context.strokeRect(x0 - 0.5, part.y - 0.5, Math.max(x1 - x0, 2), part.height + 1);
}

function drawMeasure(context, { trace, rows, scale }, colours, { from, to, label }) {
  const [x0, x1] = [scale.x(Math.min(from, to)), scale.x(Math.max(from, to))];
  context.fillStyle = colours.accent;
  context.globalAlpha = 0.16;
  context.fillRect(x0, 0, x1 - x0, rows.height);
  context.globalAlpha = 1;
  context.fillRect(Math.round(x0), 0, 1, rows.height);
  context.fillRect(Math.round(x1), 0, 1, rows.height);
  const text = label(trace);
  context.font = font(11, true);
  const width = context.measureText(text).width + 12;
  const x = Math.min(Math.max((x0 + x1 - width) / 2, scale.left + 2), scale.right - width - 2);
  context.fillStyle = colours.accent;
  context.fillRect(x, 2, width, 18);
  context.fillStyle = colours.paper;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(text, x + width / 2, 11.5);
}
