// The list of questions: filters, search, pages, the keyboard, and links to a question (#qid=...).
const PAGE_SIZE = 40;
const CLASS_NAMES = { AVG: "all", NAT: "natural science", SOC: "social science", LAN: "language science", TXT: "with text context", IMG: "with a picture", NO: "with neither", "G1-6": "grades 1 to 6", "G7-12": "grades 7 to 12" };
const START = { split: "test", set: 0, run: 0, answer: "all", rationale: "all", column: "AVG", topic: "", changed: "", other: "", otherAnswer: "", search: "" };
const browser = { ...START, found: [], page: 0, at: 0 };
const parts = {};

function drawExamples() {
  const sets = data.sets;
  if (!sets.length) {
    heading("examples", "Questions", el("p", { class: "empty" }, "No questions can be shown."));
    return;
  }
  Object.assign(browser, { set: Math.max(0, runs[0].set ?? 0) });
  browser.run = runsOfSet(browser.set)[0] ?? 0;
  parts.filters = el("form", { class: "fields", role: "search", "aria-label": "Filter the questions", on: { submit: (event) => event.preventDefault() } });
  parts.search = el("input", { type: "search", id: "search", placeholder: "text of question, rationale, answer, or id", autocomplete: "off", on: { input: () => { browser.search = parts.search.value; filter(); } } });
  parts.count = el("p", { class: "count", role: "status", id: "count" });
  parts.list = el("ol", { class: "list", id: "list", role: "listbox", tabindex: "0", "aria-label": "Questions found", on: { keydown: listKeys } });
  parts.pager = el("p", { class: "pager" });
  parts.detail = el("article", { class: "detail", id: "detail", "aria-label": "The chosen question" });
  heading("examples", "Questions", parts.filters,
    el("div", { class: "master" }, el("div", { class: "finder" }, parts.count, parts.list, parts.pager), parts.detail),
    el("p", { class: "note" }, "Keys: j and k, or the arrow keys in the list, go through the questions; / searches. The address of the page contains the chosen question."));
  drawFilters();
  filter();
  choose(interesting(), false);
  document.addEventListener("keydown", pageKeys);
  window.addEventListener("hashchange", followHash);
  followHash();
}

function drawFilters() {
  const change = (name, then) => (value) => {
    browser[name] = value;
    then?.();
    filter();
  };
  const questions = data.sets[browser.set][browser.split];
  const mine = runsOfSet(browser.set);
  const topics = [...new Set(questions.map((question) => question.topic))].sort();
  const others = mine.filter((index) => index !== browser.run).map((index) => [String(index), `from ${runs[index].label}`]);
  const splits = Object.entries(SPLIT_NAMES).filter(([split]) => data.sets[browser.set][split].length);
  replace(parts.filters,
    data.sets.length > 1 ? select("Data of", data.sets.map((_, set) => [String(set), runs[runsOfSet(set)[0]].label]), String(browser.set), (value) => browse({ ...START, set: Number(value), run: runsOfSet(Number(value))[0] }, false)) : null,
    select("Split", splits, browser.split, (value) => browse({ split: value }, false)),
    mine.length > 1 ? select("Run", mine.map((index) => [String(index), runs[index].label]), String(browser.run), change("run", () => { browser.run = Number(browser.run); browser.changed = browser.other = ""; drawFilters(); })) : null,
    select("Answer", [["all", "all"], ["wrong", "wrong"], ["right", "right"], ["unread", "not readable"], ["none", "not there yet"]], browser.answer, change("answer")),
    select("Rationale", [["all", "all"], ["right", "as the gold one"], ["wrong", "another"]], browser.rationale, change("rationale")),
    select("Class", data.columns.map((column) => [column, CLASS_NAMES[column]]), browser.column, change("column")),
    topics.some(Boolean) ? select("Topic", [["", "all"], ...topics.filter(Boolean).map((topic) => [topic, topic])], browser.topic, change("topic")) : null,
    others.length ? select("Answer differs", [["", "or not"], ...others], String(browser.changed), change("changed")) : null,
    browser.other !== "" ? el("span", { class: "field" }, el("span", { class: "tag" }, `${runs[browser.other].label}: ${browser.otherAnswer}`)) : null,
    el("span", { class: "field grow" }, el("label", { for: "search" }, "Search"), parts.search),
    el("button", { type: "button", id: "reset", on: { click: () => { parts.search.value = ""; browse({ ...START, set: browser.set, run: browser.run, split: browser.split }, false); } } }, "Clear"));
}

// Set filters (those not named are cleared) and show the matching questions.
function browse(wanted, scroll = true) {
  Object.assign(browser, { ...START, set: browser.set, run: browser.run, search: parts.search.value }, wanted);
  drawFilters();
  filter();
  if (scroll) byId("examples").scrollIntoView({ behavior: "instant", block: "start" });
}

function matches(question) {
  const said = saidBy(browser.run, browser.split, question.qid);
  if (browser.answer !== "all") {
    const answered = said !== null && said.right !== null;
    if (browser.answer === "none" ? answered : !answered) return false;
    if (browser.answer === "unread" && said.prediction !== null) return false;
    if (browser.answer === "right" && !said.right) return false;
    if (browser.answer === "wrong" && said.right) return false;
  }
  if (browser.rationale !== "all" && (said === null || said.rationale_right !== (browser.rationale === "right"))) return false;
  if (!question.columns.includes(browser.column) || (browser.topic && question.topic !== browser.topic)) return false;
  if (browser.other !== "" && saidBy(browser.other, browser.split, question.qid)?.right !== (browser.otherAnswer === "right")) return false;
  if (browser.changed !== "") {
    const other = saidBy(Number(browser.changed), browser.split, question.qid);
    if (!other || !said || other.right === null || said.right === null || other.prediction === said.prediction) return false;
  }
  return !browser.search.trim() || textOf(question).includes(browser.search.trim().toLowerCase());
}

const searchTexts = new Map();

function textOf(question) {
  const key = `${browser.set} ${browser.split} ${question.qid}`;
  if (!searchTexts.has(key)) {
    const said = runsOfSet(browser.set).map((index) => saidBy(index, browser.split, question.qid)).filter(Boolean);
    searchTexts.set(key, [question.qid, question.question, ...question.choices, ...question.accepted, question.context, question.gold, question.skill, ...said.flatMap((line) => [line.rationale, line.answer_text])].join("\n").toLowerCase());
  }
  return searchTexts.get(key);
}

function filter() {
  const questions = data.sets[browser.set][browser.split];
  browser.found = questions.filter(matches);
  replace(parts.count, el("strong", {}, whole(browser.found.length)), ` of ${whole(questions.length)} ${SPLIT_NAMES[browser.split]} questions`, pictureCount(browser.found), runsOfSet(browser.set).length > 1 ? ["; answers of ", runsOfSet(browser.set).map((index) => [runLabel(index), " "])] : null);
  choose(0, false);
}

// The first question to show: a wrong answer with an embedded picture, else a wrong answer, else the first.
function interesting() {
  const isWrong = (question) => saidBy(browser.run, browser.split, question.qid)?.right === false;
  const first = browser.found.findIndex((question) => question.picture !== null && isWrong(question));
  return first >= 0 ? first : Math.max(0, browser.found.findIndex(isWrong));
}

function pictureCount(questions) {
  const named = questions.filter((question) => question.num_pictures);
  const without = named.filter((question) => question.picture === null).length;
  return without ? `; ${whole(without)} of ${whole(named.length)} pictures are not in this file` : "";
}

function choose(index, isAsked = true) {
  browser.at = Math.min(Math.max(index, 0), Math.max(browser.found.length - 1, 0));
  browser.page = Math.floor(browser.at / PAGE_SIZE);
  drawList();
  drawDetail(browser.found[browser.at]);
  if (isAsked && browser.found[browser.at]) {
    try {
      history.replaceState(null, "", `#qid=${encodeURIComponent(browser.found[browser.at].qid)}`);
    } catch { /* some viewers do not allow changing the address */ }
  }
}

function drawList() {
  const from = browser.page * PAGE_SIZE;
  const rows = browser.found.slice(from, from + PAGE_SIZE).map((question, offset) => listRow(question, from + offset));
  replace(parts.list, rows);
  parts.list.setAttribute("aria-activedescendant", rows.length ? `row${browser.at}` : "");
  const chosen = parts.list.querySelector("[aria-selected=true]");
  if (chosen) parts.list.scrollTop = Math.max(0, chosen.offsetTop - parts.list.clientHeight / 2);
  const num = Math.ceil(browser.found.length / PAGE_SIZE);
  const turn = (by, name) => el("button", { type: "button", disabled: browser.page + by < 0 || browser.page + by >= num, on: { click: () => choose((browser.page + by) * PAGE_SIZE) } }, name);
  replace(parts.pager, num > 1 ? [turn(-1, "Earlier"), el("span", {}, ` page ${browser.page + 1} of ${num} `), turn(1, "Later")] : null);
}

function listRow(question, index) {
  return el("li", { id: `row${index}`, role: "option", "aria-selected": String(index === browser.at), on: { click: () => choose(index) } },
    runsOfSet(browser.set).map((run) => verdict(saidBy(run, browser.split, question.qid), run)),
    question.picture === null ? el("span", { class: question.num_pictures ? "thumb absent" : "thumb", "aria-hidden": "true" }) : el("img", { class: "thumb", src: data.pictures[question.picture], alt: "" }),
    el("span", { class: "brief" }, el("span", { class: "qid" }, question.qid), words((question.question || question.accepted[0] || "").slice(0, 140))));
}

function verdict(said, run) {
  const name = !said || said.right === null ? "no answer yet" : said.right ? "right" : said.prediction === null ? "not readable" : "wrong";
  const sign = { "no answer yet": "\u00b7", right: "\u2713", "not readable": "?", wrong: "\u2717" }[name];
  const title = several ? `${visible(runs[run].label)}: ${name}` : name;
  return el("span", { class: `verdict ${name === "right" ? "good" : name === "no answer yet" ? "" : "bad"}`, title }, sign, el("span", { class: "unseen" }, `${title} `));
}

function listKeys(event) {
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: PAGE_SIZE, PageUp: -PAGE_SIZE, Home: -Infinity, End: Infinity };
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  choose(browser.at + moves[event.key]);
}

function pageKeys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && event.target === parts.search) parts.list.focus();
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === "j" || event.key === "k") {
    choose(browser.at + (event.key === "j" ? 1 : -1));
    const { top, bottom } = parts.list.getBoundingClientRect();
    if (bottom < 80 || top > innerHeight - 80) byId("examples").scrollIntoView({ behavior: "instant", block: "start" });
  }
  if (event.key === "/") {
    event.preventDefault();
    parts.search.focus();
  }
}

function followHash() {
  const found = /^#qid=(.+)$/.exec(location.hash);
  if (found) {
    try {
      showQuestion(decodeURIComponent(found[1]));
    } catch { /* a mistyped address names no question */ }
  }
}

// Show a question by its id, in any split; false if there is none.
function showQuestion(qid) {
  for (const [set, splits] of data.sets.entries()) {
    for (const split of ["test", "val"]) {
      if (!splits[split].some((question) => question.qid === qid)) continue;
      parts.search.value = "";
      browse({ ...START, set, split, run: set === browser.set ? browser.run : runsOfSet(set)[0] });
      choose(browser.found.findIndex((question) => question.qid === qid));
      return true;
    }
  }
  return false;
}
