// One timeline with its header: which run and step, what bounds it, the lanes.

import { bytes, duration, h, millis, percent } from "./dom.js";
import { brushes, drawMargins, drawTimeline } from "./draw.js";
import { headOf } from "./head.js";
import { hit, rowsOf, scaleOf } from "./layout.js";
import { drawOverlay } from "./overlay.js";
import { spokenTable } from "./spoken.js";

/** Makes the panel of a side. `actions`: chooseRun(side, run), chooseStep(side, step), download(run, step), a URL. */
export function makePanel(side, actions) {
  const head = h("header", { class: "panel-head" });
  const base = h("canvas", { class: "base", role: "img" });
  const overlay = h("canvas", { class: "overlay", "aria-hidden": "true" });
  const lanes = h("div", { class: "lanes" }, base, overlay);
  const spoken = h("div", { class: "hidden" });
  const element = h(
    "section",
    { class: "panel", "data-side": side, "aria-label": `Timeline ${side}` },
    head,
    lanes,
    spoken,
  );
  const contexts = [base, overlay].map((canvas) => canvas.getContext("2d"));
  let trace = null;
  let rows = null;
  let brush = null;
  let width = 0;

  /** Shows a trace, or says why there is none. */
  function show(next, choice, runs, problem) {
    trace = next;
    rows = trace ? rowsOf(trace) : null;
    brush = null;
    const open = head.querySelector("details")?.open;
    head.replaceChildren(...headOf(side, trace, choice, runs, actions, problem));
    if (open) head.querySelector("details")?.setAttribute("open", "");
    spoken.replaceChildren(...(trace ? [spokenTable(side, trace)] : []));
    lanes.hidden = !trace;
    if (!trace) return;
    const what = `Timeline ${side}, step ${trace.step} of ${trace.run}`;
    base.setAttribute("aria-label", `${what}: ${duration(trace.makespan)}. ${trace.headline}`);
  }

  function resize(pixels) {
    width = pixels;
    if (!trace) return;
    const ratio = window.devicePixelRatio || 1;
    lanes.style.height = `${rows.height}px`;
    for (const canvas of [base, overlay]) {
      const size = [Math.round(width * ratio), Math.round(rows.height * ratio)];
      if (canvas.width !== size[0]) canvas.width = size[0];
      if (canvas.height !== size[1]) canvas.height = size[1];
      canvas.style.width = `${width}px`;
      canvas.style.height = `${rows.height}px`;
    }
    for (const context of contexts) context.setTransform(ratio, 0, 0, ratio, 0, 0);
  }

  const sceneOf = (view, more) => ({ trace, rows, view, scale: scaleOf(view, width), ...more });

  return {
    side,
    element,
    lanes,
    show,
    resize,
    get trace() {
      return trace;
    },
    forgetBrush: () => (brush = null),
    /** Draws everything; after a change of the view, the trace, the size or the theme. */
    draw(view, more, colours, dark) {
      if (!trace) return;
      brush = brush || brushes(contexts[0], trace.looks, colours, dark);
      const scene = sceneOf(view, more);
      drawTimeline(contexts[0], scene, brush, width);
      drawMargins(contexts[0], scene, brush, width, { percent, millis: short, bytes });
    },
    /** Draws what moves with the pointer. */
    drawOver(view, pointer) {
      if (trace && brush) drawOverlay(contexts[1], sceneOf(view, {}), brush, width, pointer);
    },
    /** What lies at a point of the page, and its moment in seconds. */
    at(view, clientX, clientY) {
      const box = lanes.getBoundingClientRect();
      const scale = scaleOf(view, width);
      const [x, y] = [clientX - box.left, clientY - box.top];
      const inside = x >= scale.left && x <= scale.right;
      return { target: trace ? hit(trace, rows, scale, x, y) : null, seconds: scale.seconds(x), inside };
    },
    /** Where the middle of a box is on the page. */
    where(view, rank, index, lane) {
      const span = trace.ranks[rank][lane][index];
      const part = rows.ranks[rank][lane === "predicted" ? "predicted" : "measured"];
      const box = lanes.getBoundingClientRect();
      const scale = scaleOf(view, width);
      return {
        x: box.left + scale.x((span[1] + span[2]) / 2),
        y: box.top + part.y + part.height / 2,
        width: (span[2] - span[1]) * scale.perSecond,
      };
    },
  };
}

/** ms with at most one decimal, for narrow columns. */
const short = (seconds) => (Number.isFinite(seconds) ? (seconds * 1e3).toFixed(seconds >= 0.1 ? 0 : 1) : "–");
