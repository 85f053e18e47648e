// The fusion's attention over the picture, and the gate's opening at each token.
const VEIL = 0.8; // opacity over a patch without attention

function drawLooking() {
  const ready = runs.map((run, index) => index).filter((index) => runs[index].looking?.stages);
  const why = runs.map((run, index) => (run.looking?.why ? el("p", { class: "note" }, several ? [runLabel(index), ": "] : null, run.looking.why) : null));
  if (!ready.length) {
    heading("looking", "Where the model looked", why.some(Boolean) ? why : el("p", { class: "empty" }, "No attention was measured."));
    return;
  }
  const state = { run: ready[0], stage: Object.keys(runs[ready[0]].looking.stages)[0], at: 0, token: null, pinned: null };
  const host = el("div", { class: "looking" });
  const controls = el("p", { class: "fields" });
  const redraw = () => {
    const stages = Object.keys(runs[state.run].looking.stages);
    if (!stages.includes(state.stage)) state.stage = stages[0];
    replace(controls,
      ready.length > 1 ? select("Run", ready.map((index) => [String(index), runs[index].label]), String(state.run), (value) => { Object.assign(state, { run: Number(value), at: 0 }); redraw(); }) : null,
      select("Model", stages.map((stage) => [stage, STAGE_NAMES[stage]]), state.stage, (value) => { state.stage = value; redraw(); }));
    drawLook(host, state, redraw);
  };
  heading("looking", "Where the model looked",
    el("p", { class: "note" }, "The fusion lets every token of the text attend to the patches of the picture; its gate decides how much of the result is added. A resampler's media tokens, <image 1> and on, attend to the patches instead, and the text reads them. Bright patches have the larger shares. Point at a token, or move through the text with the arrow keys, to see its own map; Enter holds it. Attention shows where values come from, not why an answer was given."),
    why, controls, host);
  redraw();
}

function drawLook(host, state, redraw) {
  const { stages, grid } = runs[state.run].looking;
  const looks = stages[state.stage];
  state.at = Math.min(state.at, looks.length - 1);
  const look = looks[state.at];
  const question = data.sets[runs[state.run].set].test.find((one) => one.qid === look.qid);
  const map = mapOf(look, question, grid);
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const tokens = el("p", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Tokens the model read; arrow keys go through them", dir: "auto" });
  const [low, high] = look.gate ? [Math.min(...look.gate), Math.max(...look.gate)] : [0, 0];
  look.tokens.forEach((token, index) => {
    const span = el("span", { class: "token", on: { pointerenter: () => show(index), click: () => hold(index) } }, visible(token).replaceAll("\n", "\u21b5"));
    if (look.gate) span.style.setProperty("--gate", `${Math.round((100 * (look.gate[index] - low)) / (high - low || 1))}%`);
    tokens.append(span);
  });
  const show = (index) => {
    state.token = index;
    [...tokens.children].forEach((span, at) => span.classList.toggle("now", at === index));
    map.show(index);
    replace(readout, lookText(look, index, map.place));
  };
  const hold = (index) => {
    state.pinned = state.pinned === index ? null : index;
    show(state.pinned ?? index);
  };
  tokens.addEventListener("pointerleave", () => show(state.pinned));
  tokens.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (event.key === "Enter" || event.key === "Escape") hold(event.key === "Enter" ? state.token : state.pinned);
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(Math.min(look.tokens.length - 1, Math.max(0, (state.token ?? -1) + moves[event.key])));
  });
  state.pinned = state.token = null;
  replace(host, pickers(looks, state, redraw),
    el("div", { class: "look" }, el("div", { class: "map-side" }, map.element, readout),
      el("div", { class: "text-side" }, lookHead(question, state, look), tokens,
        el("p", { class: "legend" }, look.gate ? [el("span", { class: "ramp", "aria-hidden": "true" }), `gate opening in this text, ${short(low)} to ${short(high)}, mean over the width`] : "This fusion has no gate."))));
  show(null);
}

function lookHead(question, state, look) {
  const said = saidBy(state.run, "test", look.qid);
  const go = () => showQuestion(look.qid);
  return el("p", {}, el("button", { type: "button", class: "link", on: { click: go } }, `Question ${look.qid}`), " ", badge(said), question && said?.prediction !== null && said?.prediction !== undefined ? [" answer ", words(answerOf(question, said.prediction)), said.right ? null : [", gold ", words(answerOf(question, question.answer))]] : null);
}

function pickers(looks, state, redraw) {
  const questions = new Map(data.sets[runs[state.run].set].test.map((question) => [question.qid, question]));
  return el("div", { class: "pickers", role: "group", "aria-label": "Questions looked at, wrong answers first" }, looks.map((look, index) => {
    const question = questions.get(look.qid);
    const said = saidBy(state.run, "test", look.qid);
    const go = () => {
      state.at = index;
      redraw();
      byId("looking").querySelectorAll(".pickers button")[index].focus();
    };
    return el("button", { type: "button", class: said?.right === false ? "pick bad" : "pick", "aria-pressed": String(index === state.at), "aria-label": `question ${look.qid}${said?.right === false ? ", answered wrong" : ""}`, on: { click: go } },
      question && question.picture !== null ? el("img", { src: data.pictures[question.picture], alt: "" }) : look.qid);
  }));
}

// The picture under an overlay that is more transparent where attention is larger.
function mapOf(look, question, grid) {
  const picture = question ? pictureOf(question) : null;
  const isGrid = grid.rows && look.num_patches % (grid.rows * grid.columns) === 0;
  if (!isGrid) {
    const note = el("p", { class: "note" }, grid.why ?? `The features have ${look.num_patches} patches, which are no grid of ${grid.rows} by ${grid.columns}; only the gate is shown.`);
    return { element: el("div", {}, picture, note), show: () => {}, place: null };
  }
  const num = grid.rows * grid.columns;
  const shades = Uint8Array.from(atob(look.attention), (character) => character.charCodeAt(0));
  const cells = Array.from({ length: num }, (_, patch) => svg("rect", { x: patch % grid.columns, y: Math.floor(patch / grid.columns), width: 1, height: 1 }));
  const top = svg("rect", { class: "top", width: 1, height: 1 });
  const overlay = svg("svg", { class: "veil", viewBox: `0 0 ${grid.columns} ${grid.rows}`, preserveAspectRatio: "none", role: "img", "aria-label": "attention over the picture" }, cells, top);
  const show = (index) => {
    const shares = sharesOf(look, shades, index).slice(0, num);
    const most = Math.max(...shares) || 1;
    cells.forEach((cell, patch) => cell.setAttribute("fill-opacity", (VEIL * (1 - shares[patch] / most)).toFixed(3)));
    const best = shares.indexOf(Math.max(...shares));
    top.setAttribute("x", best % grid.columns);
    top.setAttribute("y", Math.floor(best / grid.columns));
  };
  const place = (index) => {
    const shares = sharesOf(look, shades, index);
    const best = shares.indexOf(Math.max(...shares.slice(0, num)));
    const beyond = look.num_patches > num ? `; ${(100 * shares.slice(num).reduce((sum, one) => sum + one, 0)).toFixed(1)} % on further pictures` : "";
    return `most on row ${Math.floor(best / grid.columns) + 1}, column ${(best % grid.columns) + 1}: ${(100 * shares[best]).toFixed(1)} % (even would be ${(100 / look.num_patches).toFixed(1)} %)${beyond}`;
  };
  const isShown = question && question.picture !== null;
  const caption = (name) => el("figcaption", {}, name);
  return {
    element: isShown ? el("div", { class: "maps" }, el("figure", {}, el("div", { class: "map" }, imageOf(question), overlay), caption("attention: bright is a larger share")), el("figure", {}, el("div", { class: "map" }, imageOf(question)), caption("picture"))) : el("div", {}, picture),
    show, place,
  };
}

function sharesOf(look, shades, index) {
  if (index === null) return look.mean;
  const row = shades.subarray(index * look.num_patches, (index + 1) * look.num_patches);
  return Array.from(row, (shade) => (shade / 255) * look.scale[index]);
}

function lookText(look, index, place) {
  const name = index === null ? "Mean of all tokens" : ["Token \u201c", words(look.tokens[index].trim() || look.tokens[index]), "\u201d"];
  if (!look.gate) return [el("strong", {}, name), place ? `: ${place(index)}` : ""];
  const gate = index === null ? look.gate.reduce((sum, one) => sum + one, 0) / look.gate.length : look.gate[index];
  return [el("strong", {}, name), place ? `: ${place(index)}` : "", `; gate open ${(100 * gate).toFixed(0)} %`];
}
