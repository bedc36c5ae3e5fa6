// The fixed parts of the page.

import { h } from "./dom.js";
import { helpDialog } from "./help.js";
import { makeTooltip } from "./tooltip.js";

/** Fills `element` with the parts of the page, all empty, and returns them by name. */
export function makePage(element) {
  const button = (text, title) => h("button", { type: "button", title, "aria-label": title }, text);
  const whatCriticalIs = "the boxes that, one after the other, took the whole step (key c)";
  const page = {
    notes: h("ul", { class: "notes" }),
    partsLegend: h("div", {}),
    strategies: h("div", { class: "scroll" }),
    critical: h(
      "button",
      { type: "button", class: "toggle", "aria-pressed": "true", title: whatCriticalIs },
      h("i", { class: "critical-mark" }),
      "critical path",
    ),
    zoomIn: button("+", "zoom in (key +)"),
    zoomOut: button("−", "zoom out (key −)"),
    fit: button("whole step", "the whole step (key 0)"),
    keys: button("?", "keys (key ?)"),
    reread: button("↻", "read the runs again (key r)"),
    looks: h("ul", { class: "legend looks", "aria-hidden": "true" }),
    panels: h("div", { class: "panels" }),
    stages: h("section", { class: "stages-section" }),
    tooltip: makeTooltip(element),
    status: h("div", { class: "hidden", role: "status", "aria-live": "polite" }),
    help: helpDialog(),
  };
  const zooming = h("span", { class: "group" }, page.zoomOut, page.zoomIn, page.fit);
  page.toolbar = h("div", { class: "toolbar" }, h("h2", {}, "Timelines"), page.critical, zooming, page.looks);
  page.timelines = h(
    "section",
    { class: "timelines", tabindex: "0", "aria-label": "Timelines" },
    page.toolbar,
    page.panels,
  );
  page.timelines.hidden = true;
  const reading = h("span", { class: "group end" }, page.reread, page.keys);
  const title = h("div", { class: "toolbar" }, h("h2", {}, "Strategies"), page.partsLegend, reading);
  const strategies = h("section", { class: "strategies-section" }, title, page.strategies);
  element.classList.add("modelpar-pipeline");
  element.replaceChildren(
    page.notes,
    strategies,
    page.timelines,
    page.stages,
    page.tooltip.element,
    page.status,
    page.help,
  );
  return page;
}

/** What the boxes of the traces shown mean, as the items of a list. */
export function looksLegend(traces) {
  const used = new Set();
  const looks = {};
  for (const trace of traces) {
    Object.assign(looks, trace.looks);
    for (const rank of trace.ranks) for (const span of [...rank.spans, ...rank.predicted]) used.add(span[0]);
  }
  const swatch = (key, { colour, ink, letter }) =>
    key.startsWith("wait")
      ? h("i", { class: "wait", style: `--look:${colour}` })
      : h("i", { style: `background:${colour};color:${ink}` }, letter);
  const present = Object.entries(looks).filter(([key]) => used.has(key));
  return present.map(([key, look]) => h("li", {}, swatch(key, look), look.name));
}
