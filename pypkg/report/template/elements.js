"use strict";
// Elements and numbers as text. What a run has written enters the page as text nodes alone.

/** An element with attributes, and children that are elements or text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") made.style.cssText = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null));
  return made;
}

/**
 * A table; cells are text or elements. Columns of `numbers` (indices) are aligned right, and the
 * column `text` may be broken into lines.
 */
function table(id, head, rows, numbers = [], text = -1) {
  const kind = (column) => {
    if (numbers.includes(column)) return { class: "number" };
    return column === text ? { class: "text" } : {};
  };
  const cell = (tag) => (content, column) => element(tag, kind(column), content);
  return element("div", { class: "scroll" }, element("table", { id },
    element("thead", {}, element("tr", {}, head.map(cell("th")))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map(cell("td")))))));
}

/** A number with five significant digits; "-" for none. */
function number(value) {
  if (value === null || value === undefined) return "-";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(3);
  return Number(value.toPrecision(5)).toLocaleString("en", { maximumFractionDigits: 8 });
}

/** A number for an axis: 1500000 is 1.5M. */
function short(value) {
  if (value === null) return "";
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return `${Number((value / unit).toPrecision(4))}${letter}`;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential(1) : `${Number(value.toPrecision(4))}`;
}

/** Bytes in decimal units. */
function bytes(value) {
  if (value === null) return "-";
  for (const [unit, name] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= unit) return `${(value / unit).toFixed(2)} ${name}`;
  }
  return `${value} B`;
}

/** An ISO 8601 time in UTC without its T, as in 2026-01-31 12:00:00. */
function time(text) {
  return text.replace("T", " ").replace("+00:00", "");
}

/** The colour of number `index`, as text. */
function colour(index) {
  return style(`--curve-${index % 8}`);
}

/** A custom property of the page's style sheet. */
function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
