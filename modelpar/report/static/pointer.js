// Mouse, wheel and touch on the timelines: hover, click, drag, shift-drag.

const CLICK_PIXELS = 4;

/** Listens on an element. `on`: hover(event), leave(), click(event), pan(pixels), measure(x, x), zoom(factor, event).
 * A wheel zooms with Ctrl or `wheelZooms`, and pans sideways; else the page scrolls. */
export function listenToPointer(element, on, wheelZooms) {
  let press = null;
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    element.setPointerCapture(event.pointerId);
    press = { x: event.clientX, last: event.clientX, moved: false, measuring: event.shiftKey };
    if (event.shiftKey) event.preventDefault(); // would select text
  });
  element.addEventListener("pointermove", (event) => {
    if (!press) {
      on.hover(event);
      return;
    }
    if (Math.abs(event.clientX - press.x) >= CLICK_PIXELS) press.moved = true;
    if (!press.moved) return;
    if (press.measuring) on.measure(press.x, event.clientX);
    else on.pan(event.clientX - press.last);
    press.last = event.clientX;
  });
  const end = (event) => {
    if (press && !press.moved && event.type === "pointerup") on.click(event);
    press = null;
  };
  element.addEventListener("pointerup", end);
  element.addEventListener("pointercancel", end);
  element.addEventListener("pointerleave", () => press || on.leave());
  element.addEventListener(
    "wheel",
    (event) => {
      const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
      if (event.ctrlKey || event.metaKey || (wheelZooms && !event.shiftKey))
        on.zoom(Math.exp(pixels(event, event.deltaY) * 0.0022), event);
      else if (Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) on.pan(-pixels(event, sideways));
      else return; // the page scrolls
      event.preventDefault();
    },
    { passive: false },
  );
}

/** A wheel's delta in pixels; some browsers count lines. */
const pixels = (event, delta) => (event.deltaMode === 1 ? delta * 16 : delta);
