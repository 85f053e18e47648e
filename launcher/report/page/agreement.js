// Accuracy by the agreement of the candidates that a vote chose from, with its interval, as horizontal bars.
const VOTED = { agreement: "answers", rationale_agreement: "rationales" };
const hasAgreement = runs.some((run) => Object.values(run.agreement).some((keys) => Object.keys(keys).length));

function drawAgreement() {
  if (!hasAgreement) return;
  const tables = ["test", "val"].flatMap((split) => Object.keys(VOTED).map((key) => agreementTable(split, key)));
  heading("agreement", "Agreement",
    el("p", { class: "note" }, "A vote chose each text from several sampled candidates. Agreement is the share of them that have the chosen answer, or, of rationales, the chosen text. Accuracy is that of the answers. The thin line is its 95 % interval (Wilson)."),
    several ? el("p", { class: "legend" }, runs.map((_, index) => runLabel(index))) : null, tables).hidden = false;
}

function agreementTable(split, key) {
  const found = runs.map((run, index) => ({ index, voted: run.agreement[split]?.[key] })).filter(({ voted }) => voted);
  if (!found.length) return null;
  const rows = found[0].voted.bins.flatMap((first, at) => found.map(({ index, voted }, number) => {
    const part = { ...voted.bins[at], index };
    const range = `${at ? `above ${voted.bins[at - 1].up_to} to ` : "0 to "}${first.up_to}`;
    return el("tr", { class: number ? "again" : null },
      number ? null : el("th", { scope: several ? "rowgroup" : "row", rowspan: found.length }, range),
      several ? el("td", { class: "who" }, runLabel(index)) : null,
      el("td", { class: "bar-cell" }, part.num_questions ? bar(part) : null), el("td", {}, percent(part.accuracy)),
      el("td", { class: "soft" }, `${whole(part.num_right)} / ${whole(part.num_questions)}`));
  }));
  const mean = found.map(({ index, voted }) => `${several ? `${visible(runs[index].label)} ` : ""}${voted.mean.toFixed(3)}`).join(", ");
  return table(`Accuracy by agreement of the ${VOTED[key]}, ${SPLIT_NAMES[split]} split, in percent; mean agreement ${mean}`,
    ["agreement", ...(several ? ["run"] : []), "", "accuracy", "right / all"], [rows], { class: "bars" });
}
