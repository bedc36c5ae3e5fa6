// A timeline in words and as a table, for those who do not see it.

import { bytes, duration, exact, h, percent } from "./dom.js";
import { rankShare } from "./draw.js";

/** A table of a timeline: a row per rank, with the order in which it computed. */
export function spokenTable(side, trace) {
  const heads = ["rank", "device", "busy", "waits before its first computation", "waits between", "waits after its last", "critical path", "peak memory", "order"];
  const rows = trace.ranks.map((rank) => {
    const order = rank.spans.filter((span) => span[4] >= 0 && /^[A-Z]$/.test(span[0])).map((span) => `${span[0]}${span[4]}`);
    const cells = [rank.device, percent(rank.utilization), ...[rank.fill, rank.stall, rank.drain].map(duration), percent(rankShare(trace, rank)), bytes(rank.peak_bytes), order.join(" ")];
    return h("tr", {}, h("th", { scope: "row" }, rank.name), cells.map((cell) => h("td", {}, cell || "–")));
  });
  return h(
    "table",
    { class: "spoken" },
    h("caption", {}, `Timeline ${side}: step ${trace.step} of ${trace.run}, ${duration(trace.makespan)}. ${trace.headline || ""}`),
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, rows),
  );
}

/** Lines on one box: what it is, when, how it compares with the prediction, what it waited for. */
export function spanLines(trace, { rank, lane, index }) {
  const [look, start, end, stage, microbatch, cause] = trace.ranks[rank][lane][index];
  const name = trace.looks[look] ? trace.looks[look].name : look;
  const which = [lane === "predicted" ? "predicted" : null, stage >= 0 ? `stage ${stage}` : trace.ranks[rank].name, microbatch >= 0 ? `micro-batch ${microbatch}` : null];
  const whole = lane === "predicted" ? trace.predicted_makespan : trace.makespan;
  const lines = [
    `${name} · ${which.filter(Boolean).join(" · ")}`,
    `${exact(start)} to ${exact(end)}`,
    `${exact(end - start)} · ${percent((end - start) / whole)} of the step`,
  ];
  if (cause) lines.push(look.startsWith("wait") ? `waited for ${cause}` : cause);
  const twin = lane === "spans" && !look.startsWith("wait") && microbatch >= 0 && (trace.ranks[rank].predicted || []).find((span) => span[0] === look && span[3] === stage && span[4] === microbatch);
  if (twin) {
    const predicted = twin[2] - twin[1];
    const off = (end - start) / predicted - 1;
    lines.push(`predicted ${exact(predicted)}${Number.isFinite(off) ? `, took ${Math.abs(off * 100).toFixed(0)} % ${off < 0 ? "less" : "more"}` : ""}`);
  }
  if (lane === "spans" && trace.critical.some(([r, i]) => r === rank && i === index)) lines.push("on the critical path");
  return lines;
}
