// The page of the Pipeline tab: TensorBoard imports this module in an iframe of its own and calls render().
import {startPipelineView} from './static/pipeline.js';

const address = (path) => new URL(path, import.meta.url).href;

async function load(path) {
  const answer = await fetch(address(path));
  const json = await answer.json();
  if (!answer.ok) {
    throw new Error(json.error || `${answer.status} ${answer.statusText}`);
  }
  return json;
}

function query(run, step) {
  return `run=${encodeURIComponent(run)}&step=${step}`;
}

export function render() {
  const style = document.createElement('link');
  style.rel = 'stylesheet';
  style.href = address('./static/pipeline.css');
  document.head.append(style);
  const element = document.createElement('div');
  document.body.append(element);
  startPipelineView(element, {
    runs: () => load('./runs'),
    trace: (run, step) => load(`./trace?${query(run, step)}`),
    download: (run, step) => address(`./chrome?${query(run, step)}`),
  });
}
