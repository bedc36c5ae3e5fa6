// The Pipeline view: strategies, two timelines on one time axis, stages. Python has done the arithmetic; this draws.
// `startPipelineView(element, source)` fills an element; source.runs() and source.trace(run, step) give what
// modelpar/report/view_runs.py and view_trace.py describe, source.download(run, step) the URL of a Chrome trace or
// null.

import { makeAxis } from "./axis.js";
import { exact, h, percent } from "./dom.js";
import { listenToKeys } from "./keys.js";
import { memoryTop, scaleOf } from "./layout.js";
import { looksLegend, makePage } from "./page.js";
import { makePanel } from "./panel.js";
import { listenToPointer } from "./pointer.js";
import { memoryLines, spanLines } from "./spoken.js";
import { stagesTable } from "./stages.js";
import { partsLegend, strategiesTable } from "./strategies.js";
import { coloursOf, followTheme } from "./theme.js";
import { isWhole, moved, within, zoomed } from "./view.js";

const SIDES = ["A", "B"];
const REREAD_MS = 10000;
const ZOOM = 1.5;

/** Fills `element` with the view; resolves when the first timelines are there. */
export async function startPipelineView(element, source) {
  const state = {
    data: { runs: [], notes: [] },
    choice: { A: { run: null, step: null }, B: { run: null, step: null } }, // run "" is: nothing, on purpose
    view: { from: 0, to: 0 },
    critical: true,
    followed: null, // {microbatch, locked, lane}
    hovered: null, // {side, rank, lane, index}
    cursor: null, // seconds
    measure: null, // {from, to, label}
  };
  const page = makePage(element);
  const axis = makeAxis();
  page.toolbar.after(axis.canvas);
  const download = (run, step) => (source.download ? source.download(run, step) : null);
  const panels = {};
  for (const side of SIDES) {
    panels[side] = makePanel(side, { chooseRun, chooseStep, download });
    page.panels.append(panels[side].element);
  }

  // ---- what is shown

  const usable = () => state.data.runs.filter((run) => !run.problem && run.steps && run.steps.length);
  const runOf = (side) => usable().find((run) => run.run === state.choice[side].run);
  const traces = () => SIDES.map((side) => panels[side].trace).filter(Boolean);
  const whole = () =>
    Math.max(...traces().flatMap((each) => [each.makespan, each.predicted_makespan || 0]), 1e-9) * 1.004;

  function firstChoice(run) {
    if (!run) return { run: null, step: null };
    return {
      run: run.run,
      step: run.steps.includes(run.parts_step) ? run.parts_step : run.steps[run.steps.length - 1],
    };
  }

  /** Reads the runs; what is shown stays, unless it is gone. */
  async function readRuns() {
    const data = await source.runs();
    if (JSON.stringify(data) === JSON.stringify(state.data)) return;
    state.data = data;
    const gone = (side) => state.choice[side].run !== "" && !runOf(side);
    const changed = SIDES.filter(gone);
    for (const side of changed) {
      const other = state.choice[side === "A" ? "B" : "A"].run;
      state.choice[side] = firstChoice(usable().find((run) => run.run !== other));
    }
    showStrategies();
    const stay = SIDES.filter((side) => !changed.includes(side) && panels[side].trace);
    for (const side of stay) showPanel(side, panels[side].trace, null);
    page.timelines.hidden = !usable().length;
    ask(true);
    await Promise.all(changed.map(load));
  }

  function showStrategies() {
    const inside = page.strategies.contains(document.activeElement);
    const label = inside && document.activeElement.getAttribute("aria-label");
    page.notes.replaceChildren(...(state.data.notes || []).map((note) => h("li", {}, note)));
    page.partsLegend.replaceChildren(...[partsLegend(state.data)].filter(Boolean));
    const chosen = { A: state.choice.A.run, B: state.choice.B.run };
    const empty =
      "No run here yet. modelpar train and modelpar compare write runs; this page reads them again by itself.";
    const table = state.data.runs.length
      ? strategiesTable(state.data, chosen, chooseRun)
      : h("p", { class: "empty" }, empty);
    page.strategies.replaceChildren(table);
    if (label) page.strategies.querySelector(`[aria-label="${CSS.escape(label)}"]`)?.focus();
  }

  let loading = 0;

  /** Fetches the trace of a side and shows it, unless another one was asked for meanwhile. */
  async function load(side) {
    const choice = state.choice[side];
    let [trace, problem] = [null, null];
    if (choice.run) {
      loading += 1;
      try {
        trace = await source.trace(choice.run, choice.step);
      } catch (error) {
        problem = `step ${choice.step} of ${choice.run} cannot be read: ${error.message}`;
      }
      loading -= 1;
    }
    if (choice !== state.choice[side]) return;
    const wasWhole = !(state.view.to > 0) || isWhole(state.view, whole());
    state.hovered = null;
    page.tooltip.hide();
    showPanel(side, trace, problem);
    show(wasWhole ? { from: 0, to: whole() } : within(state.view.from, state.view.to, whole()));
    const [a, b] = SIDES.map((each) => panels[each].trace);
    const tables = a || b ? [h("h2", {}, a && b ? "Stages: A against B" : "Stages"), stagesTable(a, b)] : [];
    page.stages.replaceChildren(...tables);
    page.looks.replaceChildren(...looksLegend(traces()));
    resize();
  }

  function showPanel(side, trace, problem) {
    panels[side].show(trace, state.choice[side], usable(), problem);
    panels[side].element.hidden = side === "B" && usable().length < 2;
  }

  async function chooseRun(side, name) {
    state.choice[side] = name ? firstChoice(usable().find((run) => run.run === name)) : { run: "", step: null };
    showStrategies();
    await load(side);
  }

  async function chooseStep(side, step) {
    state.choice[side] = { ...state.choice[side], step };
    await load(side);
  }

  function stepBoth(by) {
    for (const side of SIDES) {
      const steps = runOf(side)?.steps || [];
      const next = steps[steps.indexOf(state.choice[side].step) + by];
      if (next !== undefined) chooseStep(side, next);
    }
  }

  async function exchange() {
    if (!state.choice.B.run) return;
    state.choice = { A: state.choice.B, B: state.choice.A };
    showStrategies();
    await Promise.all(SIDES.map(load));
  }

  // ---- drawing, once per frame; panels out of sight wait until they come into it

  const frame = { milliseconds: 0, count: 0, asked: false, all: false };
  const onScreen = new Set();
  let colours = {};
  let width = 0;

  function ask(all) {
    frame.all = frame.all || all;
    if (!frame.asked) requestAnimationFrame(draw);
    frame.asked = true;
  }

  function draw() {
    const begun = performance.now();
    const visible = SIDES.map((side) => panels[side]).filter((panel) => onScreen.has(panel.element));
    if (frame.all && traces().length) {
      const more = { top: memoryTop(traces()), critical: state.critical };
      for (const panel of visible) panel.draw(state.view, more, colours, element.classList.contains("dark"));
      axis.draw(state.view, whole(), colours, width);
    }
    const { followed, hovered, cursor, measure } = state;
    for (const panel of visible) {
      const here = hovered && hovered.side === panel.side ? hovered : null;
      panel.drawOver(state.view, { followed, hovered: here, cursor, measure });
    }
    Object.assign(frame, { asked: false, all: false, count: frame.count + 1, milliseconds: performance.now() - begun });
  }

  function resize() {
    width = Math.floor(page.panels.clientWidth);
    if (width <= 0) return;
    for (const side of SIDES) panels[side].resize(width);
    axis.resize(width);
    ask(true);
  }

  function show(view) {
    state.view = view;
    ask(true);
  }

  const fit = () => show({ from: 0, to: whole() });
  const zoom = (factor, at) => show(zoomed(state.view, factor, at, whole()));
  const move = (seconds) => show(moved(state.view, seconds, whole()));
  const pan = (pixels) => move(-pixels / scaleOf(state.view, width).perSecond);
  const panBy = (share) => move((state.view.to - state.view.from) * share);

  // ---- pointing and following

  const say = (text) => (page.status.textContent = text);
  const spanOf = ({ side, rank, lane, index }) => panels[side].trace.ranks[rank][lane][index];

  function follow(microbatch, locked, lane = "spans") {
    state.followed = microbatch < 0 ? null : { microbatch, locked, lane };
    if (locked && microbatch >= 0) say(`following micro-batch ${microbatch}`);
    ask(false);
  }

  function hover(side, event) {
    const { target, seconds, inside } = panels[side].at(state.view, event.clientX, event.clientY);
    state.cursor = inside ? seconds : null;
    state.hovered = target && target.index >= 0 ? { side, ...target } : null;
    const span = state.hovered && spanOf(state.hovered);
    if (!state.followed?.locked) follow(span ? span[4] : -1, false, state.hovered?.lane);
    if (span) page.tooltip.show(spanLines(panels[side].trace, state.hovered), event);
    else if (target) page.tooltip.show(memoryLines(panels[side].trace, target.rank, seconds), event);
    else page.tooltip.hide();
    ask(false);
  }

  function leave() {
    state.hovered = state.cursor = null;
    if (!state.followed?.locked) state.followed = null;
    page.tooltip.hide();
    ask(false);
  }

  function click(side, event) {
    hover(side, event);
    const span = state.hovered && spanOf(state.hovered);
    const again = span && state.followed?.locked && state.followed.microbatch === span[4];
    follow(span && !again ? span[4] : -1, true, state.hovered?.lane);
    if (!span) state.measure = null;
    page.timelines.focus({ preventScroll: true });
  }

  function followNext(by) {
    const all = traces().flatMap((trace) => trace.ranks.flatMap((rank) => rank.spans.map((span) => span[4])));
    const last = Math.max(...all);
    const next = state.followed ? state.followed.microbatch + by : by > 0 ? 0 : last;
    follow(Math.min(Math.max(next, 0), last), true);
  }

  function measure(fromX, toX) {
    const seconds = [fromX, toX].map((x) => Math.max(axis.seconds(state.view, x), 0));
    const [from, to] = [Math.min(...seconds), Math.max(...seconds)];
    const label = (trace) => `${exact(to - from)} · ${percent((to - from) / trace.makespan)} of the step`;
    state.measure = { from, to, label };
    page.tooltip.hide();
    say(`measured ${exact(to - from)}`);
    ask(false);
  }

  function escape() {
    state.measure = state.hovered = state.followed = null;
    page.tooltip.hide();
    ask(false);
  }

  function toggleCritical() {
    state.critical = !state.critical;
    page.critical.setAttribute("aria-pressed", String(state.critical));
    ask(true);
  }

  function hoverAxis(event) {
    state.cursor = Math.max(axis.seconds(state.view, event.clientX), 0);
    ask(false);
  }

  const shared = {
    leave,
    pan,
    measure,
    zoom: (factor, event) => zoom(factor, axis.seconds(state.view, event.clientX)),
  };
  for (const side of SIDES) {
    const own = { hover: (event) => hover(side, event), click: (event) => click(side, event) };
    listenToPointer(panels[side].lanes, { ...shared, ...own }, false);
  }
  listenToPointer(axis.canvas, { ...shared, hover: hoverAxis, click: () => {} }, true);

  const acts = {
    c: toggleCritical,
    "+": () => zoom(1 / ZOOM),
    "=": () => zoom(1 / ZOOM),
    "-": () => zoom(ZOOM),
    0: fit,
    ArrowLeft: () => panBy(-0.12),
    ArrowRight: () => panBy(0.12),
    "[": () => stepBoth(-1),
    "]": () => stepBoth(1),
    ",": () => followNext(-1),
    ".": () => followNext(1),
    x: exchange,
    r: readRuns,
    Escape: escape,
    "?": () => page.help.showModal(),
  };
  listenToKeys(acts, (key) => page.help.open || (!traces().length && !["?", "r"].includes(key)));
  const buttons = [
    ["critical", "c"],
    ["zoomIn", "+"],
    ["zoomOut", "-"],
    ["fit", "0"],
    ["keys", "?"],
    ["reread", "r"],
  ];
  for (const [name, key] of buttons) page[name].addEventListener("click", acts[key]);

  // ---- start

  function retheme() {
    colours = coloursOf(element);
    for (const side of SIDES) panels[side].forgetBrush();
    ask(true);
  }
  followTheme(element, retheme);
  retheme();
  new ResizeObserver(resize).observe(page.panels);
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) onScreen[entry.isIntersecting ? "add" : "delete"](entry.target);
    ask(true);
  });
  for (const side of SIDES) watcher.observe(panels[side].element);

  const failed = (error) => page.notes.replaceChildren(h("li", {}, `the runs cannot be read: ${error.message}`));
  await readRuns().catch(failed);
  if (!state.data.runs.length) showStrategies();
  // what tests ask: what is shown, and where a box is
  element.pipelineView = {
    get state() {
      return { ...state, dark: element.classList.contains("dark"), frame: { ...frame } };
    },
    redraw() {
      frame.all = true;
      draw();
    },
    get settled() {
      return !loading && !frame.asked;
    },
    trace: (side) => panels[side].trace,
    where: (side, rank, index, lane = "spans") => panels[side].where(state.view, rank, index, lane),
    zoom,
  };
  // a server that is gone leaves what is shown
  setInterval(() => document.hidden || readRuns().catch(() => {}), REREAD_MS);
}
