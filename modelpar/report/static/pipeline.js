// Stands in for the view until that is written: names the runs.
export async function startPipelineView(element, source) {
  const {runs} = await source.runs();
  element.textContent = runs.map(({run, problem, headline}) => `${run}: ${problem || headline}`).join('\n');
}
