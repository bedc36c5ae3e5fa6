// Keys that work wherever the focus is, but in a field.

/** Calls acts[key]() when a key is pressed alone; `blocked()` says when not to. */
export function listenToKeys(acts, blocked) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || blocked(event.key)) return;
    if (event.target instanceof Element && event.target.closest("input, select, textarea")) return;
    const act = Object.hasOwn(acts, event.key) && acts[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
}
