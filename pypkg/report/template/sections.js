"use strict";
// The sections of the page but the charts. Each function fills one and leaves it empty without contents.

function fill(id, title, ...children) {
  const section = document.getElementById(id);
  section.replaceChildren();
  if (children.flat().length) section.append(element("h2", {}, title), ...children.flat());
}

/** A heading of a run where there are several. */
function heading(runs, run) {
  return runs.length > 1 ? [element("h3", {}, run.name)] : [];
}

/** Sections with a part for each run that has one. */
function each(runs, part) {
  return runs.flatMap((run) => {
    const found = part(run);
    return found === null ? [] : [...heading(runs, run), found].flat();
  });
}

function showHead(page) {
  const head = document.getElementById("head");
  head.replaceChildren(element("h1", {}, page.runs.map((run) => run.name).join(", ")));
  for (const run of page.runs) {
    const of = run.max_steps === null ? "" : ` of ${number(run.max_steps)}`;
    const state = run.ended ? "ended" : `not ended, last line ${time(run.updated) || "none"} UTC`;
    const figures = Object.entries(run.figures).map(([name, text]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, text)));
    head.append(...heading(page.runs, run),
      element("p", {}, `step ${number(run.step)}${of}, ${state}`),
      element("p", { class: "note" }, run.folder),
      element("dl", { class: "figures" }, figures));
  }
}

function showContents() {
  const links = [...document.querySelectorAll("main > section")]
    .filter((section) => section.childElementCount)
    .map((section) => element("a", { href: `#${section.id}` }, section.querySelector("h2").textContent));
  document.getElementById("contents").replaceChildren(...links);
}

function showProblems(page) {
  fill("problems", "What could not be read", each(page.runs, (run) => (run.problems.length
    ? element("ul", { class: "bad" }, run.problems.map((text) => element("li", {}, text))) : null)));
}

function showKinds(page) {
  document.getElementById("kinds").replaceChildren(...kindsOf(page.runs).map(([kind, count]) =>
    element("li", {},
      element("span", { class: "swatch", style: `--swatch: ${colourOfKind(kind, page.runs)}` }),
      `${kind} (${count})`)));
}

function showNumbers(page) {
  const rows = page.runs.flatMap((run) => run.curves.map((curve) => {
    const found = curve.values.filter((value) => value !== null);
    const least = found.reduce((a, b) => Math.min(a, b), Infinity);
    const greatest = found.reduce((a, b) => Math.max(a, b), -Infinity);
    const shown = curve.values.length < curve.points ? `${curve.values.length} of ` : "";
    return [run.name, curve.name, `${shown}${number(curve.points)}`,
      number(curve.steps[0]), number(curve.values[0]), number(curve.steps.at(-1)),
      number(curve.values.at(-1)), ...(found.length ? [number(least), number(greatest)] : ["-", "-"])];
  }));
  fill("numbers", "Curves as a table", rows.length ? table("curve-table",
    ["run", "curve", "points", "first step", "first", "last step", "last", "least", "greatest"],
    rows, [2, 3, 4, 5, 6, 7, 8]) : []);
}

function showEvents(page) {
  fill("events", "Events", each(page.runs, (run) => {
    const marks = run.marks.filter((mark) => mark.kind !== "checkpoint");
    return marks.length ? table("", ["time, UTC", "event", "step", ""], marks.map((mark) =>
      [time(mark.time), mark.kind, number(mark.step), mark.text]), [2], 3) : null;
  }));
}

function showPlan(page) {
  fill("plan", "Plan and measurement", each(page.runs, (run) => (run.plan.length ? table("",
    ["first rank", "planned", "measured", "measured / planned", "parts of the plan, largest first"],
    run.plan.map((row) => [`${row.quantity}, ${row.unit}`, number(row.planned), number(row.measured),
      row.measured === null ? "-" : `${((100 * row.measured) / row.planned).toFixed(1)} %`,
      element("span", { class: "terms" }, Object.entries(row.terms)
        .map(([name, value]) => `${name} ${number(value)}`).join(", "))]), [1, 2, 3], 4) : null)));
}

const MOST_RANKS = 512; // more are not drawn

function showLayout(page) {
  fill("layout", "Layout", each(page.runs, (run) => {
    if (run.layout === null) return null;
    const { stages, replicas, world_size: size, hosts } = run.layout;
    const machines = [...new Set(hosts)];
    const rank = (index) => {
      const machine = machines.indexOf(hosts[index]);
      return element("span", { class: "rank", style: `--swatch: ${colour(Math.max(machine, 0))}`,
        title: hosts[index] ? `rank ${index} on ${hosts[index]}` : `rank ${index}` }, `${index}`);
    };
    const perReplica = stages.reduce((sum, stage) => sum + stage.replicas[0].length, 0);
    const drawn = Math.max(Math.floor(MOST_RANKS / perReplica), 1);
    const cells = [element("span"), ...stages.map((stage) => element("span", { class: "title" }, stage.title))];
    replicas.slice(0, drawn).forEach((title, row) => {
      cells.push(element("span", { class: "title side" }, title));
      stages.forEach((stage) => cells.push(
        element("div", { class: "cell" }, stage.replicas[row].map(rank))));
    });
    const grid = element("div", { class: "grid", role: "img",
      "aria-label": `${size} ranks: ${run.layout.text}`,
      style: `grid-template-columns: auto repeat(${stages.length}, auto)` }, cells);
    const ranks = size > 1 ? `${size} ranks: ${run.layout.text}` : "one process";
    const left = replicas.length > drawn ? `; the first ${drawn} of ${replicas.length} replicas` : "";
    const places = machines.length > 1
      ? [element("ul", { class: "plain" }, machines.map((host, index) => element("li", {},
        element("span", { class: "swatch", style: `--swatch: ${colour(index)}` }), host)))] : [];
    return [element("p", {}, `${ranks}${left}. A box is a tensor-parallel group; a number is a rank.`),
      ...places, element("div", { class: "scroll" }, grid)];
  }));
}

function showCheckpoints(page) {
  fill("checkpoints", "Checkpoints", each(page.runs, (run) => (run.checkpoints.length ? table("",
    ["folder", "step", "tokens", "size", "layout", "saved, UTC", "files"],
    run.checkpoints.map((row) => [row.name, number(row.step), number(row.tokens), bytes(row.num_bytes),
      row.layout, time(row.saved),
      element("span", { class: row.damage.length ? "bad" : "good" },
        [row.verdict, ...row.damage].join("; "))]), [1, 2, 3], 6) : null)));
}

function showSamples(page) {
  fill("samples", "Samples of text", each(page.runs, (run) => {
    const prompts = [...new Set(run.samples.map((sample) => sample.prompt))];
    return prompts.length ? prompts.map((prompt) => {
      const own = run.samples.filter((sample) => sample.prompt === prompt).reverse();
      const shown = ({ step, text }) =>
        element("div", { class: "sample" }, element("b", {}, `step ${number(step)}`),
          element("pre", {}, element("span", { class: "prompt" }, prompt), text));
      const older = own.length > 1 ? [element("details", {},
        element("summary", {}, `${own.length - 1} earlier`), own.slice(1).map(shown))] : [];
      return [shown(own[0]), ...older];
    }).flat() : null;
  }));
}

function showSettings(page, which) {
  const runs = page.runs.filter((run) => run.settings.length);
  const names = [...new Set(runs.flatMap((run) => run.settings.map((row) => row.name)))].sort();
  const byName = runs.map((run) => new Map(run.settings.map((row) => [row.name, row])));
  const rows = names.map((name) => {
    const found = byName.map((rows) => rows.get(name));
    const values = found.map((row) => row?.value ?? "not saved");
    return { name, values, default: found.find(Boolean).default,
      changed: found.some((row) => row?.is_changed), differs: new Set(values).size > 1 };
  }).filter((row) => which === "all" || (which === "runs" ? row.differs : row.changed));
  const choices = [["changed", "those that differ from their default"], ["all", "all"]];
  if (runs.length > 1) choices.splice(1, 0, ["runs", "those that differ between the runs"]);
  const select = element("select", { name: "which", "aria-label": "Settings" },
    choices.map(([value, text]) => element("option", { value }, text)));
  select.value = which;
  select.addEventListener("change", () => showSettings(page, select.value));
  const body = table("setting-table",
    ["setting", ...runs.map((run) => (runs.length > 1 ? run.name : "value")), "default"],
    rows.map((row) => [row.name, ...row.values, row.default]));
  body.querySelectorAll("tbody tr").forEach((line, index) => {
    line.classList.toggle("changed", rows[index].changed);
    [...line.children].slice(1).forEach((cell) => cell.classList.add("value"));
  });
  fill("settings", "Settings", runs.length ? [element("label", {}, "Show ", select), body] : []);
}

function showEnvironment(page) {
  const runs = page.runs.filter((run) => Object.keys(run.environment).length);
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.environment)))];
  fill("environment", "Environment and model", runs.length ? table("",
    ["", ...runs.map((run) => run.name)],
    names.map((name) => [name, ...runs.map((run) => time(run.environment[name] ?? "-"))]), [],
    runs.length > 1 ? -1 : 1) : []);
}
