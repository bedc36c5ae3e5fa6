// The list of keys.

import { h } from "./dom.js";

const KEYS = [
  ["hover", "follow one micro-batch through all stages"],
  ["click", "keep following it; again, or Esc: stop"],
  [", .", "follow the micro-batch before, after"],
  ["c", "critical path on, off"],
  ["Ctrl + wheel", "zoom; without Ctrl over the time axis"],
  ["+ −", "zoom"],
  ["drag, ← →", "pan"],
  ["0", "the whole step"],
  ["Shift + drag", "measure a span of time; Esc removes it"],
  ["[ ]", "earlier, later traced step, of A and B"],
  ["a b", "in a row of the table: show that run as A, as B"],
  ["x", "exchange A and B"],
  ["r", "read the runs again"],
  ["?", "this list"],
];

export function helpDialog() {
  const rows = KEYS.map(([keys, what]) =>
    h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, keys)), h("td", {}, what)),
  );
  const close = h("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const dialog = h("dialog", { class: "help", "aria-label": "Keys" }, h("table", {}, h("tbody", {}, rows)), close);
  return dialog;
}
