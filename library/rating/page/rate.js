// The view in which pictures are rated: by stars, in pairs, or twelve at a glance.

import { call, put } from "./api.js";
import { h, newToken, source, toast } from "./dom.js";
import { summary } from "./insight.js";

const AHEAD = 4; // questions whose pictures are loaded before they are needed
const GRID = 12;
const MODES = { stars: "Stars", pairs: "Pairs", grid: "Grid" };

export function rate(main, app) {
  let mode = localStorage.getItem("leco-mode") || "stars";
  let prompt = "";
  let queue = [];
  let asking = false;
  let current = null;
  let ended = false;
  const given = []; // what can be taken back
  const stage = h("section", { class: "stage", "aria-label": "Pictures to rate" });
  const controls = h("div", { class: "controls" });
  const side = h("aside", { class: "side", "aria-label": "How well it knows you" });
  const modes = h("div", { class: "segments", role: "group", "aria-label": "How to rate" });
  const filter = h("select", { id: "prompt", onchange: () => ((prompt = filter.value), restart()) });
  const tools = h("div", { class: "tools" }, modes, h("label", { class: "hidden", for: "prompt" }, "Prompt"), filter);
  main.append(h("div", { class: "work" }, tools, stage, controls), side);

  function restart() {
    queue = [];
    current = null;
    ended = false;
    showModes();
    stage.replaceChildren();
    showWhatCame();
  }

  // Only where nothing is shown when it comes: else a question would be passed over, under the hand of who answers it.
  async function showWhatCame() {
    await fillQueue();
    if (current || stage.querySelector(".grid")) return;
    if (queue.length) next();
    else showEmpty();
  }

  function showModes() {
    const buttons = Object.entries(MODES).map(([name, title]) =>
      h("button", { type: "button", "aria-pressed": String(name === mode), onclick: () => choose(name) }, title),
    );
    modes.replaceChildren(...buttons);
  }

  function choose(name) {
    mode = name;
    localStorage.setItem("leco-mode", name);
    restart();
  }

  async function fillQueue() {
    const wanted = mode === "grid" ? GRID : AHEAD;
    if (asking || queue.length >= wanted) return;
    asking = true;
    const asked = mode;
    try {
      const body = { opinion: app.opinion, count: wanted - queue.length, pairs: mode === "pairs", prompt };
      const { questions } = await call("ask", body);
      if (asked === mode) {
        ended = questions.length === 0;
        queue.push(...questions);
        for (const question of questions) question.loaded = question.pictures.map(preload);
      }
    } catch {
      ended = false; // app.js says that the server does not answer
    } finally {
      asking = false;
    }
  }

  function preload(picture) {
    const image = new Image();
    image.src = source(picture);
    image.decoding = "async";
    return image;
  }

  function picture(own, index = 0, count = 1) {
    const small = Math.max(own.width, own.height) <= 128;
    const which = count === 2 ? ["Left picture", "Right picture"][index] : "Picture to rate";
    return h("img", {
      src: source(own),
      alt: own.prompt ? `${which}: ${own.prompt}` : which,
      class: small ? "small-picture" : "",
      width: own.width,
      height: own.height,
      draggable: "false",
    });
  }

  function next() {
    if (mode === "grid") return showGrid();
    current = queue.shift() || null;
    if (!current) return showEmpty();
    if (mode === "pairs") showPair();
    else showOne();
    fillQueue();
  }

  function showEmpty() {
    const worker = app.state?.worker || {};
    const words = {
      error: worker.sentence,
      loading: "The model is being loaded. The first pictures come in a moment.",
      resting: "A slider is being trained. Pictures come again when it is done.",
    }[worker.state];
    const none = ended && worker.state === "ready" ? "You have seen every picture." : "The next pictures are being made.";
    const busy = worker.state !== "error" && !(ended && worker.state === "ready");
    stage.replaceChildren(h("div", { class: "empty" }, busy && h("div", { class: "spinner" }), h("p", {}, words || none)));
    controls.replaceChildren();
  }

  function showOne() {
    const [own] = current.pictures;
    const figure = h("figure", {}, picture(own), h("figcaption", {}, own.prompt));
    stage.replaceChildren(figure);
    controls.replaceChildren(starButtons(app.state?.levels || 5, (value) => answer("stars", value)), extras());
  }

  function showPair() {
    const buttons = current.pictures.map((own, index) =>
      h(
        "button",
        { type: "button", class: "choice", onclick: () => answer("pair", 1 - index) },
        picture(own, index, 2),
        h("span", { class: "choice-name" }, h("kbd", {}, ["\u2190", "\u2192"][index]), "This one is better"),
      ),
    );
    stage.replaceChildren(h("div", { class: "pair" }, ...buttons));
    const equal = h("button", { type: "button", class: "wide", onclick: () => answer("pair", 0.5) }, h("kbd", {}, "\u2193"), "Equal");
    controls.replaceChildren(h("div", { class: "stars" }, equal), extras());
  }

  function extras() {
    return h(
      "div",
      { class: "extras" },
      h("button", { type: "button", class: "quiet", onclick: undo, disabled: !given.length }, h("kbd", {}, "Z"), "Undo"),
      h("button", { type: "button", class: "quiet", onclick: skip }, h("kbd", {}, "Space"), "Skip"),
    );
  }

  function answer(kind, value) {
    if (!current) return;
    const pictures = current.pictures.map((own) => own.id);
    put(app.opinion, { token: current.token, mode: kind, pictures, value });
    given.push(current);
    if (given.length > 50) given.shift();
    const words = kind === "stars" ? `${value} stars` : kind === "skip" ? "skipped" : { 1: "left", 0: "right", 0.5: "equal" }[value];
    const reached = [...main.querySelectorAll(".choice, .controls button")].indexOf(document.activeElement);
    next();
    if (reached >= 0) main.querySelectorAll(".choice, .controls button")[reached]?.focus(); // who tabs to a button stays on it
    const shown = current ? current.pictures.map((own) => own.prompt).filter(Boolean).join("; ") : "";
    document.getElementById("toast").textContent = `${words}. ${shown}`; // for screen readers; it is not shown
  }

  const skip = () => (mode === "grid" ? next() : answer("skip", null));

  async function undo() {
    const last = given.pop();
    if (!last) return toast("There is nothing to take back.");
    try {
      await call("undo", { opinion: app.opinion, token: last.token });
    } catch {
      given.push(last);
      return toast("The server does not answer; try again in a moment.");
    }
    if (mode === "grid") return toast("Taken back.");
    if (current) queue.unshift(current);
    if ((last.pictures.length === 2) !== (mode === "pairs")) return;
    queue.unshift({ ...last, token: newToken() }); // a new answer: the old one stays taken back
    next();
  }

  async function showGrid() {
    current = null;
    await fillQueue();
    const questions = queue.splice(0, GRID);
    if (!questions.length) return showEmpty();
    const cells = questions.map((question) => gridCell(question));
    stage.replaceChildren(h("div", { class: "grid" }, ...cells));
    controls.replaceChildren(
      h("div", { class: "stars" }, h("button", { type: "button", class: "wide primary", onclick: next }, "Next twelve")),
      extras(),
    );
    fillQueue();
  }

  function gridCell(question) {
    const [own] = question.pictures;
    const levels = app.state?.levels || 5;
    const cell = h("div", { class: "cell", tabindex: "0", role: "group", "aria-label": own.prompt || "Picture" });
    const set = (value) => {
      const token = cell.dataset.value ? newToken() : question.token;
      if (cell.dataset.value) call("undo", { opinion: app.opinion, token: cell.dataset.token }).catch(() => {});
      put(app.opinion, { token, mode: "stars", pictures: [own.id], value });
      given.push({ ...question, token });
      Object.assign(cell.dataset, { value, token });
      for (const [index, star] of [...cell.querySelectorAll(".stars button")].entries()) {
        star.classList.toggle("on", index < value);
        star.textContent = index < value ? "\u2605" : "\u2606";
        star.setAttribute("aria-pressed", String(index + 1 === value));
      }
      for (const undoing of controls.querySelectorAll("button[disabled]")) undoing.disabled = false;
    };
    cell.append(picture(own), starButtons(levels, set, true));
    cell.rate = set;
    return cell;
  }

  function key(event) {
    const levels = app.state?.levels || 5;
    const number = event.key === "0" && levels === 10 ? 10 : Number.parseInt(event.key, 10);
    const name = event.key.toLowerCase();
    const cell = document.activeElement?.closest?.(".cell");
    if (mode === "grid" && cell && number >= 1 && number <= levels) {
      cell.rate(number);
      cell.nextElementSibling?.focus();
    } else if (mode === "stars" && number >= 1 && number <= levels) answer("stars", number);
    else if (mode === "pairs" && name === "arrowleft") answer("pair", 1);
    else if (mode === "pairs" && name === "arrowright") answer("pair", 0);
    else if (mode === "pairs" && (name === "arrowdown" || name === "=")) answer("pair", 0.5);
    else if (mode === "grid" && cell && name === "arrowright") cell.nextElementSibling?.focus();
    else if (mode === "grid" && cell && name === "arrowleft") cell.previousElementSibling?.focus();
    else if (name === " " && document.activeElement?.tagName !== "BUTTON") skip();
    else if (name === "z") undo();
    else if (name === "s") choose("stars");
    else if (name === "p") choose("pairs");
    else if (name === "g") choose("grid");
    else return;
    event.preventDefault();
  }

  function update(state) {
    const names = state.prompts.join("\n");
    if (filter.dataset.names !== names) {
      filter.dataset.names = names;
      const every = h("option", { value: "" }, "All prompts");
      filter.replaceChildren(every, ...state.prompts.map((text) => h("option", { value: text }, text)));
      filter.value = prompt;
      filter.hidden = state.prompts.length < 2;
    }
    side.replaceChildren(summary(state));
    if (!current) showWhatCame();
  }

  restart();
  return { update, key };
}

export function starButtons(levels, give, small = false) {
  const buttons = Array.from({ length: levels }, (_, index) => {
    const value = index + 1;
    const name = `${value} of ${levels}`;
    const give_ = () => give(value);
    return h(
      "button",
      { type: "button", class: "star", onclick: give_, "aria-label": name, title: small ? name : undefined },
      small ? "\u2606" : String(value),
    );
  });
  const group = h("div", { class: `stars of-${levels}${small ? " small" : ""}`, role: "group", "aria-label": "Stars" }, ...buttons);
  return small ? group : h("div", { class: "scale" }, h("span", { class: "end" }, "less"), group, h("span", { class: "end" }, "more"));
}
