// The part of the step that is in view: {from, to} in seconds. Pure functions; `whole` is the longest step shown.

/** A view of this length and beginning, or the nearest to it within the step. */
export function within(from, to, whole) {
  const length = Math.min(Math.max(to - from, whole * 1e-5), whole);
  const start = Math.min(Math.max(from, 0), whole - length);
  return { from: start, to: start + length };
}

/** The view `factor` times as long, with the moment `at` (its middle, if undefined) where it was. */
export function zoomed(view, factor, at, whole) {
  const { from, to } = view;
  const length = Math.min((to - from) * factor, whole);
  const fixed = at === undefined ? (from + to) / 2 : Math.min(Math.max(at, from), to);
  const start = fixed - ((fixed - from) / (to - from)) * length;
  return within(start, start + length, whole);
}

export const moved = (view, seconds, whole) => within(view.from + seconds, view.to + seconds, whole);

export const isWhole = (view, whole) => view.to - view.from >= whole * 0.9999;
