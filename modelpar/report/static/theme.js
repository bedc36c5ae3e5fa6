// Light or dark: TensorBoard's switch where the page is a tab of it, else what the system prefers.

/** Sets the class "dark" on an element now and whenever it changes; calls changed() after a change. */
export function followTheme(element, changed) {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const board = tensorboardBody();
  const apply = () => {
    const dark = board ? board.classList.contains("dark-mode") : system.matches;
    if (element.classList.contains("dark") === dark) return;
    element.classList.toggle("dark", dark);
    changed();
  };
  system.addEventListener("change", apply);
  if (board) new MutationObserver(apply).observe(board, { attributes: true, attributeFilter: ["class"] });
  apply();
}

/** TensorBoard shows a tab in an iframe of its own page and says on its body whether it is dark. */
function tensorboardBody() {
  try {
    const outer = window.parent.document;
    return window.parent !== window && outer.querySelector("tb-webapp") ? outer.body : null;
  } catch {
    return null; // a page of another origin
  }
}

/** The colours that drawing on a canvas needs, from the style sheet. */
export function coloursOf(element) {
  const style = getComputedStyle(element);
  const names = ["paper", "text", "faint", "grid", "idle", "accent", "memory", "memory-line", "limit", "critical"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}
