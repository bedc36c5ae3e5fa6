// The header of a timeline: which run and step, how long it took, what bounds it.

import { duration, h } from "./dom.js";

/** Returns what stands above a timeline: choice of run and step, length, headline; or why there is none. */
export function headOf(side, trace, choice, runs, actions, problem) {
  const options = runs.map((run) =>
    h(
      "option",
      { value: run.run, selected: run.run === choice.run },
      `${run.schedule} · ${(run.balance || []).join("-")} · ${run.run}`,
    ),
  );
  if (side === "B") options.unshift(h("option", { value: "", selected: !choice.run }, "nothing"));
  const select = h(
    "select",
    {
      class: "run",
      "aria-label": `run of ${side}`,
      onchange: (event) => actions.chooseRun(side, event.target.value || null),
    },
    options,
  );
  const line = h("div", { class: "line" }, h("span", { class: `badge side-${side}` }, side), select);
  const run = runs.find((each) => each.run === choice.run);
  if (run) line.append(...stepChooser(side, run, choice.step, actions));
  if (!trace) return [line, problem ? h("p", { class: "problem" }, problem) : ""];
  const predicted = trace.measured ? ` · predicted ${duration(trace.predicted_makespan)}` : " predicted";
  const clocks = trace.clock_error ? ` · clocks ± ${duration(trace.clock_error)}` : "";
  line.append(h("span", { class: "makespan" }, h("b", {}, duration(trace.makespan)), predicted + clocks));
  const href = actions.download(trace.run, trace.step);
  const title = "this step as a Chrome trace: opens in Perfetto";
  const file = `${trace.run.replaceAll("/", "_")}-step-${trace.step}.json`;
  if (href) line.append(h("a", { class: "download", href, title, download: file }, "Chrome trace"));
  const why = trace.sentences.filter((sentence) => sentence !== trace.headline);
  if (!why.length) return [line, h("p", { class: "headline" }, trace.headline)];
  const items = why.map((sentence) => h("li", {}, sentence));
  return [
    line,
    h("details", {}, h("summary", { class: "headline" }, trace.headline), h("ul", { class: "sentences" }, items)),
  ];
}

function stepChooser(side, run, step, actions) {
  const at = run.steps.indexOf(step);
  const button = (text, to, name) =>
    h(
      "button",
      {
        type: "button",
        class: "step",
        disabled: run.steps[to] === undefined,
        "aria-label": `${name} traced step of ${side}`,
        title: `${name} traced step`,
        onclick: () => actions.chooseStep(side, run.steps[to]),
      },
      text,
    );
  const select = h(
    "select",
    {
      class: "steps",
      "aria-label": `step of ${side}`,
      onchange: (event) => actions.chooseStep(side, Number(event.target.value)),
    },
    run.steps.map((each) => h("option", { value: each, selected: each === step }, `step ${each}`)),
  );
  return [h("span", { class: "steps" }, button("‹", at - 1, "earlier"), select, button("›", at + 1, "later"))];
}
