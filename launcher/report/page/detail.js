// One question in full: picture, choices, and the texts of each run next to the gold rationale.
const MAX_DIFF_WORDS = 1500; // with the spaces between them; longer texts are shown unmarked

function drawDetail(question) {
  if (!question) {
    replace(parts.detail, el("p", { class: "empty" }, "No question matches these filters."));
    return;
  }
  const mine = runsOfSet(browser.set).map((index) => [index, saidBy(index, browser.split, question.qid)]);
  const facts = [question.subject, question.topic, question.skill, question.grade].filter(Boolean);
  replace(parts.detail,
    el("h3", {}, el("span", { class: "qid" }, question.qid), el("span", { class: "soft" }, ` ${SPLIT_NAMES[browser.split]}`), mine.length === 1 ? badge(mine[0][1]) : null),
    el("div", { class: "asked" }, pictureOf(question),
      el("div", { class: "text" }, words(question.question, { class: "question" }, "p"), question.context ? words(question.context, { class: "context" }, "p") : null,
        question.choices.length ? el("ol", { class: "choices", type: "A" }, question.choices.map((choice, index) => choiceRow(question, mine, choice, index))) : el("p", { class: "accepted" }, el("span", { class: "label" }, question.accepted.length > 1 ? "Accepted answers" : "Expected text"), question.accepted.map((text) => el("span", { class: "mark gold" }, words(text)))))),
    mine.map(([index, said]) => saidPart(question, index, said)),
    words(facts.join(" / "), { class: "note" }, "p"));
}

function badge(said) {
  if (!said || said.right === null) return el("span", { class: "badge" }, "no answer yet");
  if (said.right) return el("span", { class: "badge good" }, "answered right");
  return el("span", { class: "badge bad" }, said.prediction === null ? "answer not readable" : "answered wrong");
}

function pictureOf(question) {
  if (!question.num_pictures) return null;
  if (question.picture === null) {
    const isAbsent = question.picture_absent || !data.pictures.length;
    return el("p", { class: "no-picture" }, isAbsent ? "picture not available" : "picture not in this file");
  }
  return el("figure", { class: "shown" }, imageOf(question), question.num_pictures > 1 ? el("figcaption", {}, `the first of ${question.num_pictures}`) : null);
}

function imageOf(question) {
  const image = el("img", { class: "picture", src: data.pictures[question.picture], alt: `picture of question ${question.qid}` });
  const sharpen = () => image.classList.toggle("pixels", image.naturalWidth <= 96);
  if (image.complete) sharpen();
  image.addEventListener("load", sharpen);
  return image;
}

// A choice by its index, or the text of a free answer; without an index the first accepted text.
function answerOf(question, prediction) {
  return typeof prediction === "number" ? question.choices[prediction] : prediction ?? question.accepted[0] ?? "";
}

function choiceRow(question, mine, choice, index) {
  const marks = [];
  if (index === question.answer) marks.push(el("span", { class: "mark gold" }, "gold"));
  for (const [run, said] of mine) if (said?.prediction === index) marks.push(el("span", { class: `mark ${said.right ? "good" : "bad"}` }, several ? words(runs[run].label) : "chosen"));
  return el("li", { class: index === question.answer ? "is-gold" : null }, words(choice), marks.length ? [" ", marks] : null);
}

function saidPart(question, index, said) {
  const title = several ? el("h4", {}, runLabel(index), " ", badge(said)) : null;
  if (!said) return el("div", { class: "said" }, title, el("p", { class: "empty" }, "Nothing was written about this question yet."));
  const answer = said.answer_text === null || said.answer_text === undefined ? null : el("p", { class: "answer" }, el("span", { class: "label" }, "Answer"), words(said.answer_text || "(empty)"));
  const agreements = Object.entries(VOTED).filter(([key]) => said[key] !== null).map(([key, name]) => `agreement of the ${name} ${short(said[key])}`);
  return el("div", { class: "said" }, title, rationales(question, said), answer, agreements.length ? el("p", { class: "note" }, agreements.join(", ")) : null);
}

function rationales(question, said) {
  if (said.rationale === null || said.rationale === undefined) return null;
  if (said.rationale_right) return el("div", { class: "pair" }, el("div", {}, el("span", { class: "label" }, "Rationale, as the gold one"), words(said.rationale, { class: "prose" }, "p")));
  const [ours, gold] = differences(said.rationale, question.gold);
  return el("div", { class: "pair" },
    el("div", {}, el("span", { class: "label" }, "Rationale written", said.rouge_l !== null ? `, ROUGE-L ${percent(100 * said.rouge_l)}` : null), ours),
    el("div", {}, el("span", { class: "label" }, "Gold rationale"), question.gold ? gold : el("p", { class: "empty" }, "none")));
}

// Both texts with the words marked that are missing in the other (longest common subsequence of words).
function differences(ours, gold) {
  const [a, b] = [visible(ours).split(/(\s+)/), visible(gold).split(/(\s+)/)];
  if (a.length > MAX_DIFF_WORDS || b.length > MAX_DIFF_WORDS) return [words(ours, { class: "prose" }, "p"), words(gold, { class: "prose" }, "p")];
  const width = b.length + 1;
  const common = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) common[i * width + j] = a[i] === b[j] ? common[(i + 1) * width + j + 1] + 1 : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
  }
  const [left, right] = [[], []];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      left.push([a[i++], false]);
      right.push([b[j++], false]);
    } else if (j >= b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) left.push([a[i++], true]);
    else right.push([b[j++], true]);
  }
  return [marked(left, "added"), marked(right, "lacking")];
}

function marked(pieces, kind) {
  return el("p", { class: "prose", dir: "auto" }, pieces.map(([text, isOther]) => (isOther && text.trim() ? el("mark", { class: kind }, text) : text)));
}
