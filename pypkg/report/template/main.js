"use strict";
// State of the page: what is shown, and how. A live page asks its server for newer documents.

const POLL_MILLISECONDS = 3000;

let page = JSON.parse(document.getElementById("document").textContent);
const controls = document.getElementById("controls").elements;
const view = { axis: "steps", range: null, smoothing: 0, log: false, marks: true, paper: false };
const charts = new Charts(document.getElementById("charts"), setRange);

function setRange(range) {
  view.range = range;
  controls.from.value = range ? range[0] : "";
  controls.to.value = range ? range[1] : "";
  charts.zoom(range);
}

function rangeOfInputs() {
  const [first, last] = charts.extent ?? [0, 1];
  const from = controls.from.value === "" ? first : Number(controls.from.value);
  const to = controls.to.value === "" ? last : Number(controls.to.value);
  return from < to && (from !== first || to !== last) ? [from, to] : null;
}

function drawCharts() {
  charts.draw(page.runs, view);
}

function showAll() {
  showHead(page);
  showProblems(page);
  showKinds(page);
  drawCharts();
  showNumbers(page);
  showEvents(page);
  showPlan(page);
  showLayout(page);
  showCheckpoints(page);
  showSamples(page);
  const which = document.querySelector("select[name=which]")?.value;
  showSettings(page, which ?? (page.runs.length > 1 ? "runs" : "changed"));
  showEnvironment(page);
  showContents();
  document.getElementById("foot").replaceChildren(
    `Written ${time(page.created)} UTC by pypkg ${page.version}. Charts by uPlot.`);
}

controls.axis.addEventListener("change", () => {
  view.axis = controls.axis.value;
  view.range = null;
  controls.from.value = controls.to.value = "";
  drawCharts();
});
for (const input of [controls.from, controls.to]) {
  input.addEventListener("change", () => {
    view.range = rangeOfInputs();
    charts.zoom(view.range);
  });
}
controls.reset.addEventListener("click", () => setRange(null));
controls.smoothing.addEventListener("input", () => {
  view.smoothing = Number(controls.smoothing.value);
  controls.weight.value = view.smoothing;
  drawCharts();
});
controls.log.addEventListener("change", () => { view.log = controls.log.checked; drawCharts(); });
controls.marks.addEventListener("change", () => { view.marks = controls.marks.checked; drawCharts(); });
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());

function setPaper(isPaper) {
  if (view.paper === isPaper) return;
  view.paper = isPaper;
  document.documentElement.classList.toggle("paper", isPaper);
  showAll();
}

addEventListener("beforeprint", () => setPaper(true));
addEventListener("afterprint", () => setPaper(false));
matchMedia("print").addEventListener("change", (media) => setPaper(media.matches));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showAll);

async function poll() {
  try {
    const answer = await fetch("document.json", { cache: "no-store" });
    if (answer.ok) {
      const { created, ...newer } = await answer.json();
      const { created: _, ...shown } = page;
      if (JSON.stringify(newer) !== JSON.stringify(shown)) {
        page = { created, ...newer };
        showAll();
      }
    }
  } catch {
    document.getElementById("foot").replaceChildren("The server has ended; the page stays as it is.");
    return;
  }
  setTimeout(poll, POLL_MILLISECONDS);
}

showAll();
if (page.is_live) setTimeout(poll, POLL_MILLISECONDS);
