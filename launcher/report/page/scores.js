// The most important numbers, what is missing, the score tables, and rationales by answers.
function drawSummary() {
  if (several) {
    const rows = runs.map((run, index) => [runLabel(index), ...keyNumbers(run).map((entry) => entry.value)]);
    replace(byId("summary"), table("The runs at a glance, in percent", ["Run", ...keyNumbers(runs[0]).map((entry) => entry.name)], [rows], { class: "figures-table" }));
    return;
  }
  replace(byId("summary"), el("dl", { class: "figures" }, keyNumbers(runs[0]).map((entry) =>
    el("div", {}, el("dt", {}, entry.name), el("dd", {}, el("strong", {}, entry.value, entry.value === "\u2013" ? null : el("small", {}, " %")), entry.about)))));
}

function keyNumbers(run) {
  const test = run.scores.test;
  const column = (name) => run.groups.test?.class?.find((group) => group.name === name);
  const about = (name) => {
    const group = column(name);
    const ceiling = Object.values(run.ceilings.test ?? {}).map((row) => row[name]).filter((value) => value !== null);
    return el("span", { class: "about" },
      group ? `${whole(group.num_right)} of ${whole(group.num)}; 95 % interval ${percent(group.low)} to ${percent(group.high)}` : "not scored yet",
      ceiling.length ? el("span", { class: "about" }, `text alone reaches at most ${percent(Math.max(...ceiling))}`) : null);
  };
  const judged = Object.values(run.said.test ?? {}).filter((line) => line.rationale_right !== null);
  const right = judged.filter((line) => line.rationale_right).length;
  return [
    { name: "Test questions answered right", value: percent(test?.accuracy.AVG), about: about("AVG") },
    { name: "of those with a picture", value: percent(test?.accuracy.IMG), about: about("IMG") },
    {
      name: "Rationales word for word as the gold one", value: judged.length ? percent((100 * right) / judged.length) : "\u2013",
      about: el("span", { class: "about" }, judged.length ? `${whole(right)} of ${whole(judged.length)} test questions` : "not written yet",
        test?.rationale.rougeL ? el("span", { class: "about" }, `ROUGE-L ${percent(test.rationale.rougeL)}; answers not read ${percent(test.parse_failure_rate)} %`) : null),
    },
  ];
}

function drawMissing() {
  const lines = runs.flatMap((run, index) => run.missing.map((text) => el("li", {}, several ? [runLabel(index), ": "] : null, text)));
  if (!lines.length) return;
  heading("missing", "What is missing", el("ul", {}, lines)).hidden = false;
}

function drawScores() {
  const isMini = runs.some((run) => run.is_mini_sqa);
  // AVG first, where a phone shows it; a class without a question has no column.
  const known = runs.flatMap((run) => Object.values(run.scores).map((scores) => scores.accuracy));
  const columns = ["AVG", ...data.columns.filter((column) => column !== "AVG" && known.some((row) => row[column] !== null))];
  const row = (name, values, attributes) => el("tr", attributes, el("th", { scope: "row" }, name), columns.map((column) => el("td", {}, percent(values[column]))));
  const bodies = ["val", "test"].map((split) => {
    const rows = runs.map((run, index) => run.scores[split] ? row([runLabel(index), ` ${SPLIT_NAMES[split]}, ${whole(run.scores[split].num_questions)} questions`], run.scores[split].accuracy, { class: "ours" }) : null);
    const orders = runs.flatMap((run, index) => run.choice_orders && run.choice_orders.split === split ? Object.entries(run.choice_orders.accuracy).slice(1).map(([change, values]) =>
      row([several ? [runLabel(index), ", "] : null, `choices ${change}, ${whole(run.choice_orders.num_questions[change])} questions`], values, {})) : []);
    const ceilings = new Map(runs.flatMap((run) => Object.entries(run.scores[split] ? run.ceilings[split] ?? {} : {})));
    return [...rows, ...orders, ...[...ceilings].map(([name, values]) => row(name, values, { class: "bound" }))].filter(Boolean);
  }).filter((rows) => rows.length);
  const paper = table("Test accuracy as published for ScienceQA, in percent", ["", ...columns], [Object.entries(data.published).map(([name, values]) => row(name, values))]);
  const isScienceQA = runs.some((run) => run.is_science_qa);
  heading("scores", "Scores",
    isMini ? el("p", { class: "warning" }, el("strong", {}, "MiniSQA. "), "These numbers are of a small drawn quiz. They are not comparable with the paper\u2019s, which are of ScienceQA. The ceilings are the best possible scores from the text alone, computed from the quiz\u2019s own probabilities.") : null,
    bodies.length ? table("Accuracy by class, in percent", ["", ...columns], bodies) : el("p", { class: "empty" }, "There are no scores yet: the step \u2018evaluate\u2019 is not done."),
    el("p", { class: "note" }, "NAT, SOC, LAN: natural, social, language science. TXT, IMG, NO: with text context, with a picture, with neither. G1-6, G7-12: grades. AVG: all questions."),
    rationaleScores(),
    answerScores(),
    isScienceQA ? paper : el("details", {}, el("summary", {}, "The paper\u2019s rows, of another data set"), paper));
}

function answerScores() {
  const rows = runs.flatMap((run, index) => ["val", "test"].filter((split) => run.scores[split]?.answers).map((split) =>
    [[runLabel(index), ` ${SPLIT_NAMES[split]}`], ...Object.keys(data.metrics.answer).map((name) => percent(run.scores[split].answers[name]))]));
  return rows.length ? table("Free answers and texts compared with the accepted ones, in percent", ["", ...Object.values(data.metrics.answer)], [rows]) : null;
}

function rationaleScores() {
  const everything = runs.flatMap((run) => Object.values(run.scores));
  const all = { ...data.metrics.rationale, similarity: "Similarity" };
  const names = Object.fromEntries(Object.entries(all).filter(([name]) => everything.some((scores) => (scores.rationale[name] ?? null) !== null)));
  const rows = runs.flatMap((run, index) => ["val", "test"].filter((split) => run.scores[split]).map((split) => {
    const scores = run.scores[split];
    const judged = Object.values(run.said[split] ?? {}).filter((line) => line.rationale_right !== null);
    const exact = judged.length ? (100 * judged.filter((line) => line.rationale_right).length) / judged.length : null;
    return [[runLabel(index), ` ${SPLIT_NAMES[split]}`], ...Object.keys(names).map((name) => percent(scores.rationale[name])), percent(exact), percent(scores.parse_failure_rate)];
  }));
  return rows.length ? table("Rationales compared with the gold ones, and answers that could not be read, in percent", ["", ...Object.values(names), "Word for word", "Not read"], [rows]) : null;
}

function drawReasons() {
  const parts = runs.map((run, index) => [index, ["test", "val"].find((split) => Object.values(run.said[split] ?? {}).some((line) => line.right !== null))]).filter(([, split]) => split);
  const tables = parts.map(([index, split]) => reasonsTable(index, split));
  heading("reasons", "Reasons and answers",
    el("p", { class: "note" }, "A rationale counts as right if it equals the gold one word for word, white space aside: a single other word, such as a colour, often changes the answer. An answer that cannot be read is wrong. A cell opens its questions below."),
    tables.length ? el("div", { class: "columns" }, tables) : el("p", { class: "empty" }, "There are no answers yet."),
    changesTable());
}

function reasonsTable(index, split) {
  const lines = Object.values(runs[index].said[split]).filter((line) => line.right !== null);
  const cell = (rationale, answer) => {
    const count = lines.filter((line) => line.rationale_right === rationale && line.right === answer).length;
    const name = `rationale ${rationale ? "right" : "wrong"}, answer ${answer ? "right" : "wrong"}`;
    const go = () => browse({ split, set: runs[index].set, run: index, answer: answer ? "right" : "wrong", rationale: rationale ? "right" : "wrong" });
    return el("td", {}, el("button", { type: "button", class: "cell", "aria-label": `${whole(count)} questions: ${name}`, on: { click: go } }, el("strong", {}, whole(count)), el("span", {}, share(count, lines.length))));
  };
  const without = lines.filter((line) => line.rationale_right === null).length;
  return el("div", {}, several ? el("h3", {}, runLabel(index)) : null,
    table(`${whole(lines.length)} ${SPLIT_NAMES[split]} questions`, ["", "answer right", "answer wrong"], [[true, false].map((rationale) => [`rationale ${rationale ? "right" : "wrong"}`, cell(rationale, true), cell(rationale, false)])], { class: "cross" }),
    without ? el("p", { class: "note" }, `${whole(without)} questions have no gold rationale and are not counted here.`) : null);
}

// Two runs on the same questions: the questions that only one of them answered right.
function changesTable() {
  const [first, second] = runsOfSet(runs[0].set);
  if (runs[0].set === null || second === undefined) return several ? el("p", { class: "note" }, "The runs share no questions, so their answers are not compared one by one.") : null;
  const both = data.sets[runs[0].set].test.map(({ qid }) => [saidBy(first, "test", qid), saidBy(second, "test", qid)]).filter((pair) => pair.every((line) => line && line.right !== null));
  if (!both.length) return null;
  const cell = (a, b) => {
    const count = both.filter(([x, y]) => x.right === a && y.right === b).length;
    const go = () => browse({ split: "test", set: runs[0].set, run: first, answer: a ? "right" : "wrong", other: second, otherAnswer: b ? "right" : "wrong" });
    return el("td", {}, el("button", { type: "button", class: "cell", on: { click: go }, "aria-label": `${whole(count)} questions: first run ${a ? "right" : "wrong"}, second run ${b ? "right" : "wrong"}` }, el("strong", {}, whole(count)), el("span", {}, share(count, both.length))));
  };
  const changed = both.filter(([x, y]) => x.prediction !== y.prediction).length;
  return el("div", {}, el("h3", {}, "Where the runs differ"),
    table(`${whole(both.length)} test questions that both answered`, ["", [runLabel(second), " right"], [runLabel(second), " wrong"]], [[true, false].map((a) => [[runLabel(first), a ? " right" : " wrong"], cell(a, true), cell(a, false)])], { class: "cross" }),
    el("p", {}, el("button", { type: "button", on: { click: () => browse({ split: "test", set: runs[0].set, run: first, changed: second }) } }, `List the ${whole(changed)} questions whose answer changed`)));
}
