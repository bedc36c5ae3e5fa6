// The page of the Pipeline tab: TensorBoard imports this module in an iframe of its own and calls render().
import { startPipelineView } from "./static/pipeline.js";

const address = (path) => new URL(path, import.meta.url).href;

async function load(path) {
  const answer = await fetch(address(path));
  const json = await answer.json();
  if (!answer.ok) throw new Error(json.error || `${answer.status} ${answer.statusText}`);
  return json;
}

const query = (run, step) => `run=${encodeURIComponent(run)}&step=${step}`;

export async function render() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = address("./static/pipeline.css");
  const loaded = new Promise((done) => style.addEventListener("load", done));
  document.head.append(style);
  document.documentElement.lang = "en";
  const element = document.createElement("main");
  document.body.append(element);
  // keys go to the frame that has the focus: this one, once the pointer is over it
  element.addEventListener("pointerenter", () => document.hasFocus() || window.focus());
  await loaded; // the canvas takes its colours from it
  await startPipelineView(element, {
    runs: () => load("./runs"),
    trace: (run, step) => load(`./trace?${query(run, step)}`),
    download: (run, step) => address(`./chrome?${query(run, step)}`),
  });
}
