// Header, navigation, settings, the switch between light and dark, and the drawing of all parts.
const SECTIONS = { scores: "Scores", reasons: "Reasons", examples: "Questions", looking: "Looking", groups: "Groups", agreement: "Agreement", curves: "Training", time: "Time", settings: "Settings" };

function drawHeader() {
  const title = runs.map((run) => run.label).join(" and ");
  document.title = `${visible(title)} \u2013 mmcot run report`;
  replace(byId("title"), visible(title));
  const fact = (name, value) => (value ? el("span", {}, `${name} `, el("b", {}, visible(value))) : null);
  const lines = runs.map((run, index) => el("span", { class: "line" }, several ? runLabel(index) : null,
    fact("run", [moment(run.time.first_ms), moment(run.time.last_ms)?.slice(11)].filter(Boolean).join(" to ") + (run.time.first_ms ? " UTC" : "")),
    fact("parameters", ((model) => (model ? whole(model.num_parameters) : null))([...run.stages].reverse().map((stage) => run.models[stage]).find((model) => model))),
    fact("features", run.settings["data.features"] ?? "none, text alone"),
    fact("steps", run.stages.map((stage) => stepsText(run.training[stage])).join(" + ")),
    run.missing.length ? el("span", { class: "badge bad" }, "unfinished") : null));
  replace(byId("facts"), lines);
}

function stepsText(training) {
  const done = training.last_step === null ? "0" : whole(training.last_step);
  return training.num_steps && training.last_step !== training.num_steps ? `${done} of ${whole(training.num_steps)}` : done;
}

function drawSettings() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const value = (run, name) => words(run.settings[name] === null || run.settings[name] === undefined ? "none" : typeof run.settings[name] === "object" ? JSON.stringify(run.settings[name]) : String(run.settings[name]), {}, "code");
  const differing = names.filter((name) => new Set(runs.map((run) => JSON.stringify(run.settings[name]))).size > 1);
  const rows = (which) => which.map((name) => [name, ...runs.map((run) => value(run, name))]);
  const head = () => ["setting", ...runs.map((run, index) => (several ? runLabel(index) : "value"))];
  const shapes = runs.flatMap((run, index) => Object.entries(run.models).filter(([, model]) => model).map(([stage, model]) => [[several ? [runLabel(index), ", "] : null, `stage ${stage}`], whole(model.num_parameters), words(Object.entries(model.shape).map(([name, size]) => `${name} ${size}`).join(", "))]));
  const ids = runs.flatMap((run, index) => Object.entries(run.mlflow).map(([step, id]) => [[several ? [runLabel(index), ", "] : null, words(step)], words(id, {}, "code")]));
  heading("settings", "Settings and identities",
    several ? (differing.length ? table("Settings that differ", head(), [rows(differing)], { class: "plain" }) : el("p", {}, "All settings are the same.")) : null,
    el("details", {}, el("summary", {}, `All ${names.length} settings`), table("Resolved settings", head(), [rows(names)], { class: "plain" })),
    shapes.length ? table("Models", ["model", "parameters", "shape"], [shapes], { class: "plain" }) : null,
    ids.length ? el("details", { open: !several }, el("summary", {}, "Run ids in MLflow"), table("Run ids in MLflow", ["step", "id"], [ids], { class: "plain" })) : null);
}

function drawNav() {
  replace(byId("nav"), Object.entries(SECTIONS).filter(([id]) => id !== "agreement" || hasAgreement).map(([id, name]) => el("a", { href: `#${id}` }, name)));
  replace(byId("foot"), el("p", {}, `Written ${moment(data.written_ms)} UTC. This file needs no network and sends nothing.`));
}

function drawTheme() {
  const button = byId("theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : dark.matches);
  const name = () => replace(button, isDark() ? "Light" : "Dark");
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    name();
  });
  dark.addEventListener("change", name);
  name();
}

function drawPage() {
  drawTheme();
  drawNav();
  drawHeader();
  drawSummary();
  drawMissing();
  drawScores();
  drawReasons();
  drawGroups();
  drawAgreement();
  drawLooking();
  drawCurves();
  drawTime();
  drawSettings();
  drawExamples();
}

drawPage();
