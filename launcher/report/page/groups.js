// Accuracy by class, topic, grade and so on, with its interval, as horizontal bars; and the time of each step.
const GROUP_NAMES = { class: "class", subject: "subject", topic: "topic", category: "category", skill: "skill", grade: "grade" };
const FEW_GROUPS = 30;

function drawGroups() {
  const splits = ["test", "val"].filter((split) => runs.some((run) => run.groups[split]?.class?.length));
  if (!splits.length) {
    heading("groups", "Accuracy by group", el("p", { class: "empty" }, "There are no answers yet."));
    return;
  }
  // A field that no question has, such as the skill of own data, is no choice.
  const isKnown = (field) => runs.some((run) => splits.some((split) => run.groups[split]?.[field]?.some((group) => group.name !== "")));
  const fields = Object.entries(GROUP_NAMES).filter(([field]) => isKnown(field));
  const state = { split: splits[0], field: isKnown("skill") ? "skill" : "class", order: "accuracy", all: false };
  const host = el("div", {});
  const draw = () => replace(host, groupTable(state, draw));
  const pick = (name) => (value) => {
    state[name] = value;
    state.all = false;
    draw();
  };
  heading("groups", "Accuracy by group",
    el("p", { class: "fields" }, select("Split", splits.map((split) => [split, SPLIT_NAMES[split]]), state.split, pick("split")),
      select("By", fields, state.field, pick("field")), select("Order", [["accuracy", "lowest first"], ["name", "by name"], ["num", "most questions first"]], state.order, pick("order"))),
    several ? el("p", { class: "legend" }, runs.map((_, index) => runLabel(index))) : null, host, el("p", { class: "note" }, "The thin line is the 95 % interval (Wilson) of the accuracy on more questions of this kind."));
  draw();
}

function groupTable(state, draw) {
  const byName = new Map();
  runs.forEach((run, index) => {
    for (const group of run.groups[state.split]?.[state.field] ?? []) byName.set(group.name, [...(byName.get(group.name) ?? []), { ...group, index }]);
  });
  const order = { accuracy: (a, b) => a[1][0].accuracy - b[1][0].accuracy, num: (a, b) => b[1][0].num - a[1][0].num, name: (a, b) => a[0].localeCompare(b[0], "en", { numeric: true }) };
  const groups = [...byName].sort((a, b) => (state.field === "class" && state.order === "name" ? 0 : order[state.order](a, b)));
  const shown = state.all ? groups : groups.slice(0, FEW_GROUPS);
  const rows = shown.flatMap(([name, parts]) => parts.map((part, at) => el("tr", { class: at ? "again" : null },
    at ? null : el("th", { scope: several ? "rowgroup" : "row", rowspan: parts.length }, words(name || "no name")),
    several ? el("td", { class: "who" }, runLabel(part.index)) : null,
    el("td", { class: "bar-cell" }, bar(part)), el("td", {}, percent(part.accuracy)), el("td", { class: "soft" }, `${whole(part.num_right)} / ${whole(part.num)}`))));
  const more = groups.length - shown.length;
  return [table(`Accuracy by ${GROUP_NAMES[state.field]}, ${SPLIT_NAMES[state.split]} split, in percent`, [GROUP_NAMES[state.field], ...(several ? ["run"] : []), "", "accuracy", "right / all"], [rows], { class: "bars" }),
    more ? el("p", {}, el("button", { type: "button", on: { click: () => { state.all = true; draw(); } } }, `Show ${whole(more)} more`)) : null];
}

function bar(part) {
  const inner = el("span", { class: `fill run${several ? part.index % 6 : 0}` });
  inner.style.width = `${part.accuracy}%`;
  const whisker = el("span", { class: "whisker" });
  whisker.style.left = `${part.low}%`;
  whisker.style.width = `${part.high - part.low}%`;
  return el("span", { class: "bar", role: "img", "aria-label": `${percent(part.accuracy)} percent, interval ${percent(part.low)} to ${percent(part.high)}`, title: `95 % interval ${percent(part.low)} to ${percent(part.high)}` }, inner, whisker);
}

function drawTime() {
  const total = (run) => run.steps.reduce((sum, step) => sum + (step.seconds ?? 0), 0);
  const longest = Math.max(...runs.map(total), 1e-9);
  heading("time", "Time by step", runs.map((run, index) => {
    const strip = el("div", { class: "strip", "aria-hidden": "true" }, run.steps.map((step, at) => {
      const part = el("span", { class: `step step${at}`, title: `${step.name}: ${duration(step.seconds)}` });
      part.style.width = `${(100 * (step.seconds ?? 0)) / longest}%`;
      return part;
    }));
    const rows = run.steps.map((step, at) => [[el("span", { class: `swatch step step${at}`, "aria-hidden": "true" }), step.name], step.done ? duration(step.seconds) : "not done", step.done && step.seconds !== null ? share(step.seconds, total(run)) : "\u2013", step.attempt ?? "\u2013"]);
    return el("div", { class: "stack" }, several ? el("h3", {}, runLabel(index)) : null, strip,
      table(`Steps of the run, ${duration(total(run))} in all`, ["step", "time", "share", "attempt"], [rows]));
  }));
}
