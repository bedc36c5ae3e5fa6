// The table of runs: a row each, fastest first, with where the step's time goes as a bar.

import { bytes, duration, h, percent, signedPercent } from "./dom.js";

const PART_CLASSES = ["useful", "bubble", "imbalance", "communication", "data", "overhead"];
const HEADINGS = [
  ["show", ""],
  ["schedule", "Schedule and run"],
  ["partition", "Partition"],
  ["number", "Step"],
  ["number", "× best"],
  ["where", "Where the step's time goes"],
  ["number", "Busy"],
  ["number", "Bubble", "share of all ranks' time without computing; ideal: with equal stages and free messages"],
  ["number", "Imbalance", "busy time of the busiest rank over the mean"],
  ["number", "Peak memory", "of the fullest rank"],
  ["number", "Predicted", "the plan's prediction, and how far it is from what was measured"],
];

/** Returns the table. `chosen`: {A, B} names of runs; `choose(side, run)` is called by a row's buttons and keys. */
export function strategiesTable(data, chosen, choose) {
  const longest = Math.max(...data.runs.map((run) => run.step_seconds || 0), 0);
  const body = data.runs.map((run) => strategyRow(run, longest, chosen, choose));
  return h(
    "table",
    { class: "strategies", "aria-label": "Strategies, fastest first" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        HEADINGS.map(([kind, name, hint]) => h("th", { class: kind, scope: "col", title: hint }, name)),
      ),
    ),
    h("tbody", {}, body),
  );
}

function strategyRow(run, longest, chosen, choose) {
  const usable = !run.problem && run.steps && run.steps.length > 0;
  const buttons = ["A", "B"].map((side) =>
    h(
      "button",
      {
        class: `pick side-${side}`,
        type: "button",
        disabled: !usable,
        "aria-pressed": String(chosen[side] === run.run),
        "aria-label": `show ${run.run} as ${side}`,
        title: `show as ${side} (key ${side.toLowerCase()} in this row)`,
        onclick: () => choose(side, run.run),
      },
      side,
    ),
  );
  const row = h("tr", {
    "data-run": run.run,
    class: run.problem ? "broken" : null,
    onkeydown: (event) => rowKey(event, run, usable, choose),
  });
  row.append(h("td", { class: "show" }, buttons));
  if (run.problem) {
    row.append(
      h("td", { class: "schedule" }, h("span", { class: "name", title: run.run }, run.run)),
      h("td", { class: "problem", colspan: HEADINGS.length - 2 }, run.problem),
    );
    return row;
  }
  const cell = (kind, main, faint = null, title = null) =>
    h("td", { class: kind, title }, main, faint ? h("small", {}, faint) : null);
  const over = run.memory_limit && run.peak_bytes > run.memory_limit;
  row.append(
    h(
      "td",
      { class: "schedule", title: run.headline || null },
      h("b", {}, run.schedule || "–"),
      h("span", { class: "name", title: run.run }, run.run),
    ),
    cell(
      "partition",
      run.partition || "–",
      run.balance.join("-"),
      `layers per stage: ${run.balance.join("-")}; ${run.num_ranks} ranks, ${run.num_microbatches} micro-batches`,
    ),
    cell("number strong", duration(run.step_seconds), run.measured ? null : "predicted"),
    cell("number", run.relative ? run.relative.toFixed(2) : "–"),
    h("td", { class: "where" }, partsBar(run, longest)),
    cell("number", percent(run.utilization)),
    cell("number", percent(run.bubble), run.ideal_bubble === null ? null : `ideal ${percent(run.ideal_bubble)}`),
    cell("number", run.imbalance ? run.imbalance.toFixed(2) : "–"),
    cell(
      over ? "number over" : "number",
      bytes(run.peak_bytes),
      run.memory_limit ? `of ${bytes(run.memory_limit)}` : null,
    ),
    run.measured
      ? cell("number", duration(run.predicted_seconds), signedPercent(run.error))
      : cell("number", duration(run.predicted_seconds)),
  );
  return row;
}

/** Keys in a row: a, b show it; up and down go to the neighbouring row's buttons. */
function rowKey(event, run, usable, choose) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const side = event.key.toUpperCase();
  if (usable && (side === "A" || side === "B")) choose(side, run.run);
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const row =
      event.key === "ArrowDown" ? event.currentTarget.nextElementSibling : event.currentTarget.previousElementSibling;
    const button = row && row.querySelector("button:not([disabled])");
    if (button) button.focus();
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

/** A bar as long as the step, against the longest of all runs; its parts add up to the step. */
function partsBar(run, longest) {
  const parts = run.parts || [];
  const total = parts.reduce((sum, part) => sum + Math.max(part.seconds, 0), 0);
  if (!total) return h("span", { class: "faint" }, "–");
  const said = parts.map((part) => `${part.name} ${duration(part.seconds)} (${percent(part.seconds / total)})`);
  const pieces = parts.map((part, i) => {
    const share = Math.max(part.seconds, 0) / total;
    const title = `${part.name}: ${duration(part.seconds)}, ${percent(share)} of step ${run.parts_step}`;
    return h(
      "i",
      {
        class: PART_CLASSES[i],
        style: `flex-grow:${share}`,
        title,
        "data-part": part.name,
        "data-seconds": part.seconds,
      },
      h("span", {}, `${Math.round(share * 100)} %`),
    );
  });
  const width = longest ? Math.max((run.step_seconds / longest) * 100, 2) : 100;
  return h("div", { class: "parts", role: "img", "aria-label": said.join(", "), style: `width:${width}%` }, pieces);
}

/** What the colours of the bars mean. */
export function partsLegend(data) {
  const run = data.runs.find((each) => each.parts && each.parts.length);
  if (!run) return null;
  return h(
    "ul",
    { class: "legend parts-legend", "aria-hidden": "true" },
    run.parts.map((part, i) => h("li", {}, h("i", { class: PART_CLASSES[i] }), part.name)),
  );
}
