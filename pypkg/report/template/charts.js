"use strict";
// The charts: one uPlot for each title. All share the x axis, its zoom and the cursor.

const CHART_HEIGHT = 240;
const PAPER_WIDTH = 330; // of a chart on paper, two beside each other

class Charts {
  /** `onRange` is called with [from, to], or null for the whole run, when a user zooms. */
  constructor(container, onRange) {
    this.container = container;
    this.onRange = onRange;
    this.plots = [];
    this.extent = null;
    this.observer = new ResizeObserver(() => this.fit());
  }

  /** Draws all charts of `runs` anew, as `view` says. */
  draw(runs, view) {
    this.plots.forEach((plot) => plot.destroy());
    this.observer.disconnect();
    this.container.replaceChildren();
    this.view = view;
    const groups = chartsOf(runs);
    this.extent = extentOf(groups, view);
    this.plots = groups.map((group) => this.plot(group, runs));
    this.plots.forEach((plot) => this.observer.observe(plot.root.parentElement));
    this.zoom(view.range);
  }

  plot(group, runs) {
    const box = element("figure", { class: "chart", style: "margin: 0" },
      element("h3", {}, group.title, " ", element("span", { class: "unit" }, group.unit)));
    this.container.append(box);
    const { data, series } = plotted(group, runs, this.view);
    const values = data.slice(1).flat().filter((value) => value !== null && value !== undefined);
    const isLog = this.view.log && values.some((value) => value > 0);
    const axis = { stroke: style("--soft"), grid: { stroke: style("--line"), width: 1 },
      ticks: { stroke: style("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    const options = {
      width: this.widthOf(box), height: CHART_HEIGHT, series,
      scales: { x: { time: false }, y: { distr: isLog ? 3 : 1 } },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map(short) },
        { ...axis, size: 62, values: (_, ticks) => ticks.map(short) },
      ],
      cursor: { sync: { key: "charts" }, drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => { this.onRange(null); } } },
      hooks: {
        setSelect: [(plot) => this.selected(plot)],
        draw: [(plot) => drawMarks(plot, runs, this.view)],
      },
    };
    const plot = new uPlot(options, data, box);
    plot.root.setAttribute("role", "img");
    plot.root.setAttribute("aria-label", `${group.title}; the numbers are in the table of curves`);
    return plot;
  }

  selected(plot) {
    const { left, width } = plot.select;
    if (width < 3) return;
    const range = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.onRange(range);
  }

  /** Shows [from, to] of the x axis in all charts; null: the whole run. */
  zoom(range) {
    const [min, max] = range ?? this.extent ?? [0, 1];
    this.plots.forEach((plot) => plot.setScale("x", { min, max }));
  }

  widthOf(box) {
    return this.view.paper ? PAPER_WIDTH : Math.max(box.clientWidth - 20, 200);
  }

  fit() {
    for (const plot of this.plots) {
      const width = this.widthOf(plot.root.parentElement);
      if (width !== plot.width) plot.setSize({ width, height: CHART_HEIGHT });
    }
  }
}

/** The curves of all runs by chart: [{title, unit, curves: [{run, curve}]}]. */
function chartsOf(runs) {
  const groups = new Map();
  runs.forEach((run, index) => {
    for (const curve of run.curves) {
      if (!groups.has(curve.chart)) {
        groups.set(curve.chart, { title: curve.chart, unit: curve.unit, curves: [] });
      }
      groups.get(curve.chart).curves.push({ run: index, curve });
    }
  });
  return [...groups.values()];
}

/** [xs, ys] of a curve on an axis: ascending, one point for each x, the later one of two. */
function pointsOf(curve, view) {
  const points = new Map();
  curve[view.axis].forEach((x, index) => {
    if (x !== null) points.set(x, curve.values[index]);
  });
  const xs = [...points.keys()].sort((a, b) => a - b);
  return [xs, xs.map((x) => points.get(x))];
}

/** Exponential moving average of weight `weight`, without the bias of its start. */
function smoothed(values, weight) {
  let sum = 0;
  let share = 1;
  return values.map((value) => {
    if (value === null) return null;
    sum = sum * weight + (1 - weight) * value;
    share *= weight;
    return sum / (1 - share);
  });
}

/** Data and series of uPlot for a chart; under a smoothed curve its points stay, faintly. */
function plotted(group, runs, view) {
  const tables = [];
  const series = [{ label: view.axis === "steps" ? "step" : "tokens",
    value: (_, x) => (x === null ? "-" : short(x)) }];
  const positive = (ys) => (view.log ? ys.map((y) => (y > 0 ? y : null)) : ys);
  group.curves.forEach(({ run, curve }, index) => {
    const stroke = colour(runs.length > 1 ? run : index);
    const label = runs.length > 1 ? `${curve.name}, ${runs[run].name}` : curve.name;
    const dash = runs.length > 1 && curve.name.startsWith("eval_") ? [6, 4] : undefined;
    const [xs, ys] = pointsOf(curve, view);
    const common = { stroke, dash, spanGaps: true, points: { show: xs.length < 40, size: 5 } };
    if (view.smoothing > 0) {
      tables.push([xs, positive(ys)]);
      series.push({ ...common, label: `${label}, as logged`, alpha: 0.3, width: 1,
        points: { show: false }, value: (_, y) => number(y) });
    }
    tables.push([xs, positive(view.smoothing > 0 ? smoothed(ys, view.smoothing) : ys)]);
    series.push({ ...common, label, width: 1.5, value: (_, y) => number(y) });
  });
  return { data: uPlot.join(tables), series };
}

/** The smallest and the largest x of all curves; null without any. */
function extentOf(groups, view) {
  const xs = groups.flatMap((group) => group.curves.flatMap(({ curve }) => pointsOf(curve, view)[0]));
  if (!xs.length) return null;
  const min = xs.reduce((a, b) => Math.min(a, b));
  const max = xs.reduce((a, b) => Math.max(a, b));
  return min < max ? [min, max] : [min - 1, max + 1];
}

/** Events as lines over the height of a chart, checkpoints as ticks at its foot. */
function drawMarks(plot, runs, view) {
  if (!view.marks) return;
  const { ctx, bbox } = plot;
  ctx.save();
  for (const mark of runs.flatMap((run) => run.marks)) {
    const x = view.axis === "steps" ? mark.step : mark.tokens;
    if (x === null || x < plot.scales.x.min || x > plot.scales.x.max) continue;
    const isCheckpoint = mark.kind === "checkpoint";
    const left = plot.valToPos(x, "x", true);
    ctx.strokeStyle = colourOfKind(mark.kind, runs);
    ctx.lineWidth = (isCheckpoint ? 2 : 1) * devicePixelRatio;
    ctx.setLineDash(isCheckpoint ? [] : [4 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(left, isCheckpoint ? bbox.top + bbox.height - 8 * devicePixelRatio : bbox.top);
    ctx.lineTo(left, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

/** The kinds of marks that stand at a step, in a fixed order, with their numbers. */
function kindsOf(runs) {
  const counts = new Map();
  for (const mark of runs.flatMap((run) => run.marks)) {
    if (mark.step !== null) counts.set(mark.kind, (counts.get(mark.kind) ?? 0) + 1);
  }
  return [...counts].sort(([a], [b]) => (a < b ? -1 : 1));
}

function colourOfKind(kind, runs) {
  if (kind === "checkpoint") return style("--soft");
  const kinds = kindsOf(runs).map(([name]) => name).filter((name) => name !== "checkpoint");
  return colour(6 - (kinds.indexOf(kind) % 7)); // the curves begin with the other end
}
