// A timeline in words and as a table, for those who do not see it.

import { bytes, duration, exact, h, percent } from "./dom.js";
import { rankShare } from "./draw.js";
import { bytesAt } from "./layout.js";

/** A table of a timeline: a row per rank, with the order in which it computed. */
export function spokenTable(side, trace) {
  const heads = [
    "rank",
    "device",
    "busy",
    "waits before its first computation",
    "waits between",
    "waits after its last",
    "critical path",
    "peak memory",
    "order",
  ];
  const rows = trace.ranks.map((rank) => {
    const order = rank.spans
      .filter((span) => span[4] >= 0 && /^[A-Z]$/.test(span[0]))
      .map((span) => `${span[0]}${span[4]}`);
    const cells = [
      rank.device,
      percent(rank.utilization),
      ...[rank.fill, rank.stall, rank.drain].map(duration),
      percent(rankShare(trace, rank)),
      bytes(rank.peak_bytes),
      order.join(" "),
    ];
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, rank.name),
      cells.map((cell) => h("td", {}, cell || "–")),
    );
  });
  return h(
    "table",
    { class: "spoken" },
    h(
      "caption",
      {},
      `Timeline ${side}: step ${trace.step} of ${trace.run}, ${duration(trace.makespan)}. ${trace.headline || ""}`,
    ),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        heads.map((head) => h("th", { scope: "col" }, head)),
      ),
    ),
    h("tbody", {}, rows),
  );
}

/** Lines on one box: what it is, when, how it compares with the prediction, what it waited for. */
export function spanLines(trace, { rank, lane, index }) {
  const [look, start, end, stage, microbatch, cause] = trace.ranks[rank][lane][index];
  const name = trace.looks[look] ? trace.looks[look].name : look;
  const which = [
    lane === "predicted" ? "predicted" : null,
    stage >= 0 ? `stage ${stage}` : trace.ranks[rank].name,
    microbatch >= 0 ? `micro-batch ${microbatch}` : null,
  ];
  const whole = lane === "predicted" ? trace.predicted_makespan : trace.makespan;
  const lines = [
    `${name} · ${which.filter(Boolean).join(" · ")}`,
    `${exact(start)} to ${exact(end)}`,
    `${exact(end - start)} · ${percent((end - start) / whole)} of the step`,
  ];
  if (cause) lines.push(look.startsWith("wait") ? `waited for ${cause}` : cause);
  const isTwin = (span) => span[0] === look && span[3] === stage && span[4] === microbatch;
  const comparable = lane === "spans" && microbatch >= 0 && !look.startsWith("wait");
  const twin = comparable && trace.ranks[rank].predicted.find(isTwin);
  if (twin) {
    const predicted = twin[2] - twin[1];
    const more = (end - start) / predicted - 1;
    const times = Number.isFinite(more)
      ? `, took ${Math.abs(more * 100).toFixed(0)} % ${more < 0 ? "less" : "more"}`
      : "";
    lines.push(`predicted ${exact(predicted)}${times}`);
  }
  if (lane === "spans" && trace.critical.some(([r, i]) => r === rank && i === index))
    lines.push("on the critical path");
  return lines;
}

/** Lines on the memory of a rank at a moment. */
export function memoryLines(trace, rank, seconds) {
  const { memory, predicted_memory: predicted, memory_limit: limit, peak_bytes: peak, name } = trace.ranks[rank];
  const counted = bytesAt(memory, seconds);
  const expected = bytesAt(predicted, seconds);
  return [
    `memory of ${name} at ${exact(seconds)}`,
    `${bytes(counted)} counted`,
    expected === null ? null : `${bytes(expected)} predicted`,
    peak ? `${bytes(peak)} measured as the peak of the step` : null,
    limit ? `limit ${bytes(limit)}` : null,
  ].filter(Boolean);
}
