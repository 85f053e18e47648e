// Helpers of all parts of the page. Data is put into the page only as text nodes and known attributes.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const several = runs.length > 1;
const SPLIT_NAMES = { val: "validation", test: "test" };
const KNOWN_STAGES = { rationale: "Stage one: rationale", answer: "Stage two: answer" };
const STAGE_NAMES = Object.fromEntries([...new Set(runs.flatMap((run) => run.stages))].map((stage) => [stage, KNOWN_STAGES[stage] ?? `Stage ${stage}`]));

// An element; attributes that are null or false are omitted, functions under "on" are listeners.
function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(3)) if (child !== null && child !== undefined && child !== false) element.append(child);
}

function replace(element, ...children) {
  element.replaceChildren();
  append(element, children);
}

// Text of data, with its own direction and visible control characters.
function words(value, attributes, tag = "span") {
  return el(tag, { dir: "auto", ...attributes }, visible(value));
}

function visible(value) {
  return String(value ?? "").replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0))).replace(/\u007f/g, "\u2421");
}

function byId(id) {
  return document.getElementById(id);
}

function heading(section, title, ...after) {
  replace(byId(section), el("h2", { id: `${section}-title` }, title), ...after);
  return byId(section);
}

// A table that scrolls by itself on a narrow page; cells that are table elements are not wrapped.
function table(caption, head, bodies, attributes) {
  const cell = (content, index) =>
    content instanceof Element && /^T[HD]$/.test(content.tagName) ? content : index === 0 ? el("th", { scope: "row" }, content) : el("td", {}, content);
  const rows = (body) => body.map((row) => (row instanceof Element ? row : el("tr", {}, row.map(cell))));
  return el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": caption },
    el("table", attributes, el("caption", {}, caption), el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
      bodies.map((body) => el("tbody", {}, rows(body)))));
}

function select(label, options, value, change) {
  const id = `s${(select.count = (select.count ?? 0) + 1)}`;
  const box = el("select", { id, on: { change: (event) => change(event.target.value) } },
    options.map(([key, name]) => el("option", { value: key, selected: key === value }, visible(name))));
  return el("span", { class: "field" }, el("label", { for: id }, label), box);
}

function runLabel(index) {
  return el("span", { class: "run" }, several ? el("span", { class: `swatch run${index % 6}`, "aria-hidden": "true" }) : null, words(runs[index].label));
}

const whole = (value) => Number(value).toLocaleString("en-US");
const percent = (value) => (value === null || value === undefined ? "\u2013" : Number(value).toFixed(2));
const share = (part, all) => (all ? ((100 * part) / all).toFixed(1) + " %" : "\u2013");

function short(value) {
  if (value === null || value === undefined) return "\u2013";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size < 0.0001) return value.toExponential(1).replace("e-", "e\u2212");
  return String(Number(value.toPrecision(size < 1 ? 3 : 4)));
}

function moment(ms) {
  return ms ? new Date(ms).toISOString().slice(0, 16).replace("T", " ") : null;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "\u2013";
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// The output of run number `index` for a question, or null.
function saidBy(index, split, qid) {
  return runs[index].said[split]?.[qid] ?? null;
}

function runsOfSet(set) {
  return runs.map((_, index) => index).filter((index) => runs[index].set === set);
}
