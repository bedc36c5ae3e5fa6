// The table of stages: A, B and the difference, stage by stage.

import { bytes, count, duration, h, layerRange, millis, percent, signed, signedPercent } from "./dom.js";

const HEADS = [
  ["", "Stage"],
  ["", "Run"],
  ["text", "Layers"],
  ["number", "Parameters"],
  ["number", "Forward, ms"],
  ["number", "predicted"],
  ["number", "Backward, ms"],
  ["number", "predicted"],
  ["text", "Waits most for"],
  ["number", "Waits, ms"],
  ["number", "Critical path"],
  ["number", "Peak memory"],
];

/** Returns the table of two traces, either of which may be null; times are means over the step's micro-batches. */
export function stagesTable(a, b) {
  const stages = Math.max(...[a, b].map((trace) => (trace ? trace.stages.length : 0)));
  const bodies = [];
  for (let stage = 0; stage < stages; stage += 1) {
    const [left, right] = [a, b].map((trace) => (trace ? trace.stages[stage] : undefined));
    const rows = [
      left && sideRow("A", left, a),
      right && sideRow("B", right, b),
      left && right && differenceRow(left, right),
    ].filter(Boolean);
    rows[0].prepend(h("th", { scope: "rowgroup", rowspan: rows.length, class: "stage" }, String(stage)));
    bodies.push(h("tbody", { "data-stage": stage }, rows));
  }
  const head = h(
    "thead",
    {},
    h(
      "tr",
      {},
      HEADS.map(([kind, name]) => h("th", { scope: "col", class: kind }, name)),
    ),
  );
  return h("table", { class: "stages", "aria-label": a && b ? "Stages of A and B" : "Stages" }, head, bodies);
}

function sideRow(side, stage, trace) {
  const waits = Object.entries(stage.waits || {}).sort((x, y) => y[1] - x[1]);
  const total = waits.reduce((sum, [, seconds]) => sum + seconds, 0);
  const all = waits.map(([cause, seconds]) => `${cause}: ${duration(seconds)}`).join("\n");
  const most = trace.stages.every((each) => (each.critical_share || 0) <= (stage.critical_share || 0));
  const number = (text, kind = "") => h("td", { class: `number ${kind}` }, text);
  return h(
    "tr",
    { "data-side": side },
    h("td", {}, h("span", { class: `badge side-${side}` }, side)),
    h("td", { class: "text", title: (stage.layers || []).join(", ") }, layerRange(stage.layers)),
    number(count(stage.parameters)),
    number(millis(stage.forward_seconds), "strong"),
    number(millis(stage.predicted_forward_seconds), "faint"),
    number(millis(stage.backward_seconds), "strong"),
    number(millis(stage.predicted_backward_seconds), "faint"),
    h(
      "td",
      { class: "text", title: all || null },
      waits.length ? waits[0][0] : "–",
      waits.length > 1 ? h("small", {}, `${percent(waits[0][1] / total)} of it`) : null,
    ),
    number(millis(total)),
    h(
      "td",
      { class: `number critical${most ? " most" : ""}` },
      h("i", { style: `width:${40 * Math.min(stage.critical_share || 0, 1)}px` }),
      percent(stage.critical_share),
    ),
    number(bytes(stage.peak_bytes)),
  );
}

function differenceRow(a, b) {
  const difference = (x, y, text) => {
    const words = text(Math.abs(y - x));
    return /[1-9]/.test(words) ? signed(y - x, text) : words === "–" ? words : "=";
  };
  const change = (name, text) => difference(a[name] ?? NaN, b[name] ?? NaN, text);
  const moved = [
    ...(b.layers || []).filter((layer) => !(a.layers || []).includes(layer)).map((layer) => `+${layer}`),
    ...(a.layers || []).filter((layer) => !(b.layers || []).includes(layer)).map((layer) => `−${layer}`),
  ];
  const sum = (stage) => Object.values(stage.waits || {}).reduce((x, y) => x + y, 0);
  const number = (text, share = "") =>
    h("td", { class: "number" }, share ? h("small", {}, share) : null, share ? " " : null, text);
  const points = (b.critical_share || 0) - (a.critical_share || 0);
  return h(
    "tr",
    { class: "difference", "data-side": "B-A" },
    h("td", {}, "B − A"),
    h(
      "td",
      { class: "text", title: moved.join(" ") || null },
      moved.length ? moved.slice(0, 4).join(" ") + (moved.length > 4 ? " …" : "") : "=",
    ),
    number(change("parameters", count)),
    number(change("forward_seconds", millis), ratio(a.forward_seconds, b.forward_seconds)),
    number(change("predicted_forward_seconds", millis)),
    number(change("backward_seconds", millis), ratio(a.backward_seconds, b.backward_seconds)),
    number(change("predicted_backward_seconds", millis)),
    h("td", {}),
    number(difference(sum(a), sum(b), millis)),
    number(`${signed(points * 100, (value) => value.toFixed(0))} points`),
    number(change("peak_bytes", bytes)),
  );
}

const ratio = (a, b) => (a && b ? signedPercent(b / a - 1) : "");
