// The Pipeline view: strategies, two timelines on one time axis, stages. Python has done the arithmetic; this draws.
// `startPipelineView(element, source)` fills an element; source.runs(), source.trace(run, step) give what
// modelpar/report/pipeline_view.py describes, source.download(run, step) the URL of a Chrome trace or null.

import { makeAxis } from "./axis.js";
import { duration, exact, h, percent } from "./dom.js";
import { helpDialog } from "./help.js";
import { memoryTop, scaleOf } from "./layout.js";
import { makePanel } from "./panel.js";
import { listen } from "./pointer.js";
import { spanLines } from "./spoken.js";
import { stagesTable } from "./stages.js";
import { partsLegend, strategiesTable } from "./strategies.js";
import { coloursOf, followTheme } from "./theme.js";

const SIDES = ["A", "B"];
const REREAD_MS = 10000;

/** Fills `element` with the view; resolves when the first timelines are there. */
export async function startPipelineView(element, source) {
  const state = {
    data: { runs: [], notes: [] },
    choice: { A: { run: null, step: null }, B: { run: null, step: null } },
    view: { from: 0, to: 1 },
    critical: true,
    followed: null, // {microbatch, locked, lane}
    hovered: null, // {side, rank, lane, index}
    cursor: null,
    measure: null,
  };
  const frame = { milliseconds: 0, count: 0 };
  const page = makePage(element);
  const axis = makeAxis();
  page.toolbar.after(axis.canvas);
  const actions = { chooseRun, chooseStep, download: (run, step) => (source.download ? source.download(run, step) : null) };
  const panels = Object.fromEntries(SIDES.map((side) => [side, makePanel(side, actions)]));
  page.panels.append(...SIDES.map((side) => panels[side].element));

  let colours = {};
  let width = 0;
  const dirty = { all: false, over: false, asked: false };
  const loads = { A: 0, B: 0 };
  const onScreen = new Set(); // panels; the others are drawn when they come into view
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) onScreen[entry.isIntersecting ? "add" : "delete"](entry.target);
      ask("all");
    },
    { rootMargin: "80px" },
  );
  for (const side of SIDES) watcher.observe(panels[side].element);

  // ---- what is shown -------------------------------------------------------------------------------------------

  const traces = () => SIDES.map((side) => panels[side].trace).filter(Boolean);
  const whole = () => Math.max(...traces().flatMap((trace) => [trace.makespan, trace.predicted_makespan || 0]), 1e-9) * 1.004;

  async function readRuns() {
    const data = await source.runs();
    if (JSON.stringify(data) === JSON.stringify(state.data)) return;
    state.data = data;
    const usable = data.runs.filter((run) => !run.problem && run.steps && run.steps.length);
    const known = (name) => usable.some((run) => run.run === name);
    if (!known(state.choice.A.run)) state.choice.A = firstChoice(usable[0]);
    if (!known(state.choice.B.run) && state.choice.B.run !== undefined) state.choice.B = firstChoice(usable.find((run) => run.run !== state.choice.A.run));
    showStrategies();
    await Promise.all(SIDES.map((side) => load(side)));
  }

  const firstChoice = (run) => {
    if (!run) return { run: null, step: null };
    return { run: run.run, step: run.steps.includes(run.parts_step) ? run.parts_step : run.steps[run.steps.length - 1] };
  };

  function showStrategies() {
    const focus = document.activeElement && document.activeElement.getAttribute("aria-label");
    const inside = page.strategies.contains(document.activeElement);
    const { runs, notes } = state.data;
    page.notes.replaceChildren(...(notes || []).map((note) => h("li", {}, note)));
    page.legend.replaceChildren(...[partsLegend(state.data)].filter(Boolean));
    const chosen = { A: state.choice.A.run, B: state.choice.B.run };
    page.strategies.replaceChildren(
      runs.length
        ? strategiesTable(state.data, chosen, chooseRun)
        : h("p", { class: "empty" }, "No run here yet. modelpar train and modelpar compare write runs; this page reads them again by itself."),
    );
    if (inside && focus) page.strategies.querySelector(`[aria-label="${CSS.escape(focus)}"]`)?.focus();
  }

  /** Fetches the trace of a side and shows it, unless another one was asked for meanwhile. */
  async function load(side) {
    const choice = state.choice[side];
    const asked = (loads[side] += 1);
    let trace = null;
    let message = null;
    if (choice.run) {
      try {
        trace = await source.trace(choice.run, choice.step);
      } catch (error) {
        message = `step ${choice.step} of ${choice.run} cannot be read: ${error.message}`;
      }
    }
    if (asked !== loads[side]) return;
    panels[side].show(trace, choice, state.data.runs, message);
    panels[side].element.hidden = side === "B" ? state.data.runs.length < 2 : !state.data.runs.length;
    state.hovered = null;
    showTooltip(null);
    page.timelines.hidden = !traces().length && !message;
    showStages();
    showLegend();
    fit();
    resize();
  }

  function showStages() {
    const [a, b] = SIDES.map((side) => panels[side].trace);
    const first = a || b;
    page.stages.replaceChildren(...(first ? [h("h2", {}, a && b ? "Stages: A against B" : "Stages"), stagesTable(first, a && b ? b : null)] : []));
  }

  function showLegend() {
    const present = new Map();
    for (const trace of traces()) {
      const used = new Set(trace.ranks.flatMap((rank) => [...rank.spans, ...(rank.predicted || [])].map((span) => span[0])));
      for (const [key, look] of Object.entries(trace.looks)) if (used.has(key)) present.set(key, look);
    }
    const swatch = (key, look) =>
      key.startsWith("wait") ? h("i", { class: "wait", style: `--look:${look.colour}` }) : h("i", { style: `background:${look.colour};color:${look.ink}` }, look.letter);
    page.looks.replaceChildren(...[...present].map(([key, look]) => h("li", {}, swatch(key, look), look.name)));
  }

  async function chooseRun(side, name) {
    const run = state.data.runs.find((each) => each.run === name);
    state.choice[side] = run ? firstChoice(run) : { run: undefined, step: null };
    showStrategies();
    await load(side);
  }

  async function chooseStep(side, step) {
    state.choice[side] = { ...state.choice[side], step };
    await load(side);
  }

  function stepBoth(by) {
    for (const side of SIDES) {
      const run = state.data.runs.find((each) => each.run === state.choice[side].run);
      const next = run && run.steps[run.steps.indexOf(state.choice[side].step) + by];
      if (next !== undefined && run) chooseStep(side, next);
    }
  }

  // ---- drawing -------------------------------------------------------------------------------------------------

  function ask(what) {
    dirty[what] = true;
    if (dirty.asked) return;
    dirty.asked = true;
    requestAnimationFrame(() => {
      dirty.asked = false;
      draw();
    });
  }

  function draw() {
    const begun = performance.now();
    if (dirty.all) {
      const more = { top: memoryTop(traces()), critical: state.critical };
      const dark = element.classList.contains("dark");
      for (const side of SIDES) if (onScreen.has(panels[side].element)) panels[side].draw(state.view, more, colours, dark);
      if (traces().length) axis.draw(state.view, whole(), colours, width);
    }
    const follow = state.followed ? state.followed.microbatch : null;
    for (const side of SIDES) {
      const hovered = state.hovered && state.hovered.side === side ? state.hovered : null;
      const lane = state.followed ? state.followed.lane : "spans";
      panels[side].drawOver(state.view, { follow, lane, hovered, cursor: state.cursor, measure: state.measure });
    }
    dirty.all = dirty.over = false;
    frame.milliseconds = performance.now() - begun;
    frame.count += 1;
  }

  function resize() {
    width = Math.floor(page.panels.clientWidth);
    if (width <= 0) return;
    for (const side of SIDES) panels[side].resize(width);
    axis.resize(width);
    ask("all");
  }

  function setView(from, to) {
    const all = whole();
    const length = Math.min(Math.max(to - from, all * 1e-5), all);
    const start = Math.min(Math.max(from, 0), all - length);
    state.view = { from: start, to: start + length };
    ask("all");
  }

  const fit = () => setView(0, whole());

  function zoom(factor, seconds) {
    const { from, to } = state.view;
    const at = seconds === undefined ? (from + to) / 2 : Math.min(Math.max(seconds, from), to);
    const length = Math.min((to - from) * factor, whole());
    setView(at - ((at - from) / (to - from)) * length, at + ((to - at) / (to - from)) * length);
  }

  const pan = (pixels) => {
    const seconds = pixels / scaleOf(state.view, width).perSecond;
    setView(state.view.from - seconds, state.view.to - seconds);
  };

  // ---- pointing ------------------------------------------------------------------------------------------------

  function follow(microbatch, locked, lane = "spans") {
    state.followed = microbatch === null ? null : { microbatch, locked, lane };
    ask("over");
  }

  const spanOf = ({ side, rank, lane, index }) => (index < 0 ? null : panels[side].trace.ranks[rank][lane][index]);

  function hover(side, event) {
    const { target, seconds, inside } = panels[side].at(state.view, event.clientX, event.clientY);
    state.cursor = inside ? seconds : null;
    state.hovered = target && target.index >= 0 ? { side, ...target } : null;
    const span = state.hovered && spanOf(state.hovered);
    if (!state.followed || !state.followed.locked) follow(span && span[4] >= 0 ? span[4] : null, false, state.hovered ? state.hovered.lane : "spans");
    if (span) showTooltip(spanLines(panels[side].trace, state.hovered), event);
    else if (target && target.lane === "memory") showTooltip(memoryLines(panels[side].trace, target.rank, seconds), event);
    else showTooltip(null);
    ask("over");
  }

  function leave() {
    state.hovered = state.cursor = null;
    if (state.followed && !state.followed.locked) state.followed = null;
    showTooltip(null);
    ask("over");
  }

  function click(side, event) {
    hover(side, event);
    const span = state.hovered && spanOf(state.hovered);
    const same = span && state.followed && state.followed.locked && state.followed.microbatch === span[4];
    if (span && span[4] >= 0 && !same) {
      follow(span[4], true, state.hovered.lane);
      say(`following micro-batch ${span[4]}`);
    } else {
      follow(null, false);
      if (!span) state.measure = null;
    }
    page.timelines.focus({ preventScroll: true });
  }

  function measure(side, fromX, toX) {
    const seconds = [fromX, toX].map((x) => Math.max(panels[side].at(state.view, x, 0).seconds, 0));
    const [from, to] = [Math.min(...seconds), Math.max(...seconds)];
    state.measure = { from, to, label: (trace) => `${exact(to - from)} · ${percent((to - from) / trace.makespan)} of the step` };
    showTooltip(null);
    say(`measured ${exact(to - from)}`);
    ask("over");
  }

  function showTooltip(lines, event) {
    page.tooltip.hidden = !lines;
    if (!lines) return;
    page.tooltip.replaceChildren(...lines.map((line, i) => h(i ? "div" : "b", {}, line)));
    const box = element.getBoundingClientRect();
    const room = document.documentElement.clientWidth - event.clientX;
    const x = room < page.tooltip.offsetWidth + 24 ? event.clientX - page.tooltip.offsetWidth - 14 : event.clientX + 14;
    const below = event.clientY + page.tooltip.offsetHeight + 26 < window.innerHeight;
    const y = below ? event.clientY + 18 : event.clientY - page.tooltip.offsetHeight - 12;
    page.tooltip.style.transform = `translate(${Math.round(x - box.left)}px, ${Math.round(y - box.top)}px)`;
  }

  const say = (text) => (page.status.textContent = text);

  for (const side of SIDES) {
    listen(panels[side].lanes, {
      hover: (event) => hover(side, event),
      leave,
      click: (event) => click(side, event),
      pan,
      measure: (from, to) => measure(side, from, to),
      zoom: (factor, event) => zoom(factor, panels[side].at(state.view, event.clientX, 0).seconds),
    });
  }
  const onAxis = (event) => scaleOf(state.view, width).seconds(event.clientX - axis.canvas.getBoundingClientRect().left);
  listen(
    axis.canvas,
    { hover: (event) => ((state.cursor = Math.max(onAxis(event), 0)), ask("over")), leave, click: () => {}, pan, measure: (from, to) => measure("A", from, to), zoom: (factor, event) => zoom(factor, onAxis(event)) },
    { wheelAlwaysZooms: true },
  );

  // ---- keys ----------------------------------------------------------------------------------------------------

  function toggleCritical() {
    state.critical = !state.critical;
    page.critical.setAttribute("aria-pressed", String(state.critical));
    ask("all");
  }

  function followNext(by) {
    const numbers = [...new Set(traces().flatMap((trace) => trace.ranks.flatMap((rank) => rank.spans.map((span) => span[4]))))].filter((n) => n >= 0).sort((a, b) => a - b);
    if (!numbers.length) return;
    const at = state.followed ? numbers.indexOf(state.followed.microbatch) + by : by > 0 ? 0 : numbers.length - 1;
    const next = numbers[Math.min(Math.max(at, 0), numbers.length - 1)];
    follow(next, true);
    say(`following micro-batch ${next}`);
  }

  async function exchange() {
    if (!state.choice.B.run) return;
    state.choice = { A: state.choice.B, B: state.choice.A };
    showStrategies();
    await Promise.all(SIDES.map((side) => load(side)));
  }

  function escape() {
    follow(null, false);
    state.measure = state.hovered = null;
    showTooltip(null);
  }

  const step = () => (state.view.to - state.view.from) * 0.12;
  const keys = {
    c: toggleCritical,
    "+": () => zoom(1 / 1.5),
    "=": () => zoom(1 / 1.5),
    "-": () => zoom(1.5),
    "−": () => zoom(1.5),
    0: fit,
    ArrowLeft: () => setView(state.view.from - step(), state.view.to - step()),
    ArrowRight: () => setView(state.view.from + step(), state.view.to + step()),
    "[": () => stepBoth(-1),
    "]": () => stepBoth(1),
    ",": () => followNext(-1),
    ".": () => followNext(1),
    x: exchange,
    r: readRuns,
    Escape: escape,
    "?": () => page.help.showModal(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || page.help.open) return;
    if (event.target.closest && event.target.closest("input, select, textarea")) return;
    const act = keys[event.key];
    if (!act || (!traces().length && !["?", "r"].includes(event.key))) return;
    event.preventDefault();
    act();
  });
  page.critical.addEventListener("click", toggleCritical);
  page.zoomIn.addEventListener("click", () => zoom(1 / 1.5));
  page.zoomOut.addEventListener("click", () => zoom(1.5));
  page.fit.addEventListener("click", fit);
  page.keys.addEventListener("click", () => page.help.showModal());
  page.reread.addEventListener("click", readRuns);

  // ---- start ---------------------------------------------------------------------------------------------------

  const retheme = () => {
    colours = coloursOf(element);
    for (const side of SIDES) panels[side].retheme();
    ask("all");
  };
  followTheme(element, retheme);
  retheme();
  new ResizeObserver(resize).observe(page.panels);
  element.pipelineView = {
    get state() {
      return { ...state, dark: element.classList.contains("dark"), frame: { ...frame } };
    },
    trace: (side) => panels[side].trace,
    where: (side, rank, index, lane = "spans") => panels[side].where(state.view, rank, index, lane),
    redraw() {
      dirty.all = true;
      draw();
      return frame.milliseconds;
    },
    zoom,
  };
  await readRuns().catch((error) => page.notes.replaceChildren(h("li", {}, `the runs cannot be read: ${error.message}`)));
  setInterval(() => document.hidden || readRuns().catch(() => {}), REREAD_MS); // the server may be gone; what is shown stays
}

function memoryLines(trace, rank, seconds) {
  const at = (points) => {
    let size = null;
    for (const [when, value] of points || []) if (when <= seconds) size = value;
    return size;
  };
  const { memory, predicted_memory: predicted, memory_limit: limit, peak_bytes: peak, name } = trace.ranks[rank];
  const mb = (size) => `${(size / 1e6).toFixed(1)} MB`;
  const lines = [`memory of ${name}`, `${duration(seconds)}: ${at(memory) === null ? "–" : mb(at(memory))} counted`];
  if (predicted && at(predicted) !== null) lines.push(`predicted ${mb(at(predicted))}`);
  if (peak) lines.push(`peak of the step: ${mb(peak)} measured`);
  if (limit) lines.push(`limit ${mb(limit)}`);
  return lines;
}

/** The fixed parts of the page. */
function makePage(element) {
  const button = (text, title, attributes = {}) => h("button", { type: "button", title, "aria-label": title, ...attributes }, text);
  const page = {
    notes: h("ul", { class: "notes" }),
    legend: h("div", { class: "legend-holder" }),
    strategies: h("div", { class: "scroll" }),
    critical: h("button", { type: "button", class: "toggle", "aria-pressed": "true", title: "the boxes that, one after the other, took the whole step (key c)" }, h("i", { class: "critical-mark" }), "critical path"),
    zoomIn: button("+", "zoom in (key +)"),
    zoomOut: button("−", "zoom out (key −)"),
    fit: button("whole step", "the whole step (key 0)"),
    keys: button("?", "keys (key ?)"),
    reread: button("↻", "read the runs again (key r)"),
    looks: h("ul", { class: "legend looks" }),
    panels: h("div", { class: "panels" }),
    stages: h("section", { class: "stages-section" }),
    tooltip: h("div", { class: "tooltip", role: "tooltip", hidden: true }),
    status: h("div", { class: "hidden", role: "status", "aria-live": "polite" }),
    help: helpDialog(),
  };
  page.toolbar = h("div", { class: "toolbar" }, h("h2", {}, "Timelines"), page.critical, h("span", { class: "group" }, page.zoomOut, page.zoomIn, page.fit), page.looks);
  page.timelines = h("section", { class: "timelines", tabindex: "0", "aria-label": "Timelines" }, page.toolbar, page.panels);
  page.timelines.hidden = true;
  const title = h("div", { class: "toolbar" }, h("h2", {}, "Strategies"), page.legend, h("span", { class: "group end" }, page.reread, page.keys));
  element.classList.add("modelpar-pipeline");
  element.replaceChildren(page.notes, h("section", { class: "strategies-section" }, title, page.strategies), page.timelines, page.stages, page.tooltip, page.status, page.help);
  return page;
}
