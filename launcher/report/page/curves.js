// Training curves: SVG with axes, values at the pointer, and the arrow keys.
const MAIN_METRICS = ["loss", "learning_rate", "tokens_per_s", "grad_norm"];
const METRIC_NAMES = { loss: "Loss", learning_rate: "Learning rate", tokens_per_s: "Tokens a second", grad_norm: "Gradient norm", validation_loss: "Validation loss" };
const PLOT = { height: 172, left: 54, right: 12, top: 10, bottom: 24 };

function drawCurves() {
  const stages = Object.keys(STAGE_NAMES).filter((stage) => runs.some((run) => Object.keys(run.curves[stage] ?? {}).length));
  if (!stages.length) {
    heading("curves", "Training", el("p", { class: "empty" }, "No training has logged a point yet."));
    return;
  }
  const names = [...new Set(stages.flatMap((stage) => runs.flatMap((run) => Object.keys(run.curves[stage] ?? {}))))];
  const main = MAIN_METRICS.filter((name) => names.includes(name));
  const others = names.filter((name) => !main.includes(name) && name !== "validation_loss").sort();
  const extra = el("div", { class: "plots" });
  const show = (name) => replace(extra, name ? stages.map((stage) => plotOf(name, stage)) : null);
  const notes = runs.flatMap((run, index) => stages.flatMap((stage) => (run.notes[stage] ?? []).map((note) => el("li", {}, several ? [runLabel(index), ", "] : null, `stage ${stage}, step ${whole(note.step)}: `, words(note.text)))));
  heading("curves", "Training",
    el("p", { class: "note" }, "Point at a curve, or focus it and use the arrow keys, to read its values. Axes that span more than two decades are logarithmic."),
    several ? el("p", { class: "legend" }, runs.map((_, index) => runLabel(index))) : null,
    main.map((name) => el("div", { class: "plots" }, stages.map((stage) => plotOf(name, stage)))),
    others.length ? el("p", {}, select("Another metric", [["", "choose one"], ...others.map((name) => [name, metricName(name)])], "", show)) : null, extra,
    notes.length ? el("details", {}, el("summary", {}, `Notes of the trainings (${notes.length})`), el("ul", {}, notes)) : null);
}

function metricName(name) {
  return METRIC_NAMES[name] ?? name.replaceAll("_", " ");
}

function plotOf(name, stage) {
  const series = [];
  runs.forEach((run, index) => {
    for (const metric of name === "loss" ? ["loss", "validation_loss"] : [name]) {
      const curve = run.curves[stage]?.[metric];
      if (!curve) continue;
      const label = name === "loss" ? (metric === "loss" ? "training" : "validation") : "";
      series.push({
        label: [several ? run.label : "", label].filter(Boolean).join(" "), color: several ? `run${index % 6}` : metric === "validation_loss" ? "ink" : "run0",
        points: curve.steps.map((step, at) => [step, curve.values[at]]), dots: metric === "validation_loss", num: curve.num_points,
      });
    }
  });
  return plot(`${metricName(name)}, ${STAGE_NAMES[stage].toLowerCase()}`, series);
}

function plot(title, series) {
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const holder = el("div", { class: "canvas" });
  const figure = el("figure", { class: "plot" }, el("figcaption", {}, visible(title)), holder, readout);
  if (!series.length) {
    replace(holder, el("p", { class: "empty" }, "no points"));
    return figure;
  }
  const steps = [...new Set(series.flatMap((one) => one.points.map(([step]) => step)))].sort((a, b) => a - b);
  let at = null;
  const showValues = (index) => {
    at = index;
    const step = steps[index ?? steps.length - 1];
    const values = series.map((one) => [one, nearest(one.points, step)]).filter(([, point]) => point);
    replace(readout, el("span", {}, `step ${whole(step)}`), values.map(([one, point]) => el("span", {}, el("span", { class: `swatch ${one.color}`, "aria-hidden": "true" }), `${visible(one.label)} ${short(point[1])}`.trim())));
    holder.querySelector(".cursor")?.setAttribute("d", index === null ? "" : holder.cursorAt(step));
  };
  const draw = () => {
    const width = Math.max(220, Math.round(holder.clientWidth || 420));
    if (holder.drawnWidth === width) return;
    holder.drawnWidth = width;
    replace(holder, drawPlot(title, series, steps, width, holder, showValues, () => at));
    showValues(at);
  };
  new ResizeObserver(draw).observe(holder);
  draw();
  return figure;
}

function drawPlot(title, series, steps, width, holder, showValues, current) {
  const values = series.flatMap((one) => one.points.map(([, value]) => value)).filter((value) => value !== null);
  const y = scaleY(values);
  const [first, last] = [steps[0], steps[steps.length - 1]];
  const x = (step) => PLOT.left + ((step - first) / (last - first || 1)) * (width - PLOT.left - PLOT.right);
  const bottom = PLOT.height - PLOT.bottom;
  holder.cursorAt = (step) => `M${x(step).toFixed(1)},${PLOT.top}V${bottom}`;
  const lines = series.map((one) => [
    svg("path", { class: `line ${one.color}${one.dots ? " dashed" : ""}`, d: pathOf(one.points, x, y) }),
    one.dots ? one.points.filter(([, value]) => value !== null && (!y.log || value > 0)).map(([step, value]) => svg("circle", { class: `dot ${one.color}`, cx: x(step).toFixed(1), cy: y(value).toFixed(1), r: 2.4 })) : null,
  ]);
  const move = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const step = first + ((event.clientX - box.left - PLOT.left) / (width - PLOT.left - PLOT.right)) * (last - first);
    showValues(closest(steps, step));
  };
  const key = (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    showValues(Math.min(steps.length - 1, Math.max(0, (current() ?? steps.length - 1) + moves[event.key])));
  };
  return svg("svg", { width, height: PLOT.height, tabindex: "0", role: "img", "aria-label": `${visible(title)}: ${describeSeries(series)}`, on: { pointermove: move, pointerleave: () => showValues(null), keydown: key, blur: () => showValues(null) } },
    y.ticks.map((tick) => [svg("path", { class: "rule", d: `M${PLOT.left},${y(tick).toFixed(1)}H${width - PLOT.right}` }), svg("text", { x: PLOT.left - 6, y: (y(tick) + 3.5).toFixed(1), "text-anchor": "end" }, short(tick))]),
    niceTicks(first, last, Math.max(2, Math.floor(width / 110))).map((tick) => svg("text", { x: x(tick).toFixed(1), y: PLOT.height - 7, "text-anchor": x(tick) > width - 40 ? "end" : "middle" }, whole(tick))),
    svg("path", { class: "axis", d: `M${PLOT.left},${bottom}H${width - PLOT.right}` }), lines, svg("path", { class: "cursor", d: "" }));
}

function describeSeries(series) {
  return series.map((one) => `${one.label || "value"} from ${short(one.points[0][1])} to ${short(one.points[one.points.length - 1][1])} over ${whole(one.num)} points`).join("; ");
}

// A function from value to pixel, with its ticks; logarithmic if the values span more than two decades.
function scaleY(values) {
  const positive = values.filter((value) => value > 0);
  let low = values.length ? Math.min(...values) : 0;
  let high = values.length ? Math.max(...values) : 1;
  const log = positive.length > 1 && low >= 0 && high / Math.min(...positive) > 100;
  if (log) low = Math.min(...positive);
  else if (low > 0 && low < 0.5 * high) low = 0;
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const turn = log ? Math.log10 : (value) => value;
  const [from, to] = [turn(low), turn(high)];
  const scale = (value) => PLOT.height - PLOT.bottom - ((turn(value) - from) / (to - from)) * (PLOT.height - PLOT.bottom - PLOT.top);
  scale.log = log;
  const decades = log ? niceTicks(Math.ceil(from), Math.floor(to), 5).filter(Number.isInteger).map((power) => 10 ** power) : [];
  scale.ticks = log ? decades : niceTicks(low, high, 4);
  return scale;
}

function pathOf(points, x, y) {
  let path = "";
  let pen = "M";
  for (const [step, value] of points) {
    if (value === null || (y.log && value <= 0)) {
      pen = "M";
      continue;
    }
    path += `${pen}${x(step).toFixed(1)},${y(value).toFixed(1)}`;
    pen = "L";
  }
  return path;
}

function niceTicks(low, high, count) {
  if (high <= low) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}

function closest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle;
    else high = middle;
  }
  return value - sorted[low] <= sorted[high] - value ? low : high;
}

function nearest(points, step) {
  return points.length ? points[closest(points.map(([x]) => x), step)] : null;
}
