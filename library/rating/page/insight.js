// What the running scorer understands of a person: in words, as a bar, and as a curve.

import { h, svg, two } from "./dom.js";

const heading = { start: "Getting to know you", more: "It is learning", enough: "It knows you", "not learned": "It does not learn this" };

// The small panel beside the pictures; on a phone, one line above them.
export function summary(state) {
  const { progress } = state;
  return h(
    "div",
    { class: `summary ${progress.status.replace(" ", "-")}` },
    h("p", { class: "count" }, h("b", {}, String(state.answers)), state.answers === 1 ? " answer" : " answers"),
    h("h2", {}, heading[progress.status]),
    bar(progress),
    h("p", { class: "words" }, progress.words || "Rate some pictures, and it says how well it knows you."),
    progress.drift && h("p", { class: "note" }, progress.drift),
    progress.status === "enough" && h("a", { class: "button primary", href: "#train" }, "Make the slider"),
    h("p", { class: "worker muted" }, workerWords(state.worker)),
  );
}

export function workerWords(worker) {
  if (worker.state === "error") return worker.sentence;
  if (worker.state === "loading") return "Loading the model \u2026";
  if (worker.state === "resting") return "No pictures are made while a slider is trained.";
  const left = worker.left_out ? ` ${worker.left_out} could not be read, such as: ${worker.example}` : "";
  return `${worker.pictures} pictures, ${Math.max(0, worker.waiting)} not seen yet.${left}`;
}

// From chance to perfect: what is predicted, how sure that is, and what could be reached at most.
function bar(progress) {
  const chance = progress.measure === "accuracy" ? 0.5 : 0;
  const at = (value) => 100 * Math.min(1, Math.max(0, (value - chance) / (1 - chance)));
  const held = progress.held_out;
  const ceiling = progress.ceiling;
  const words = held
    ? `${progress.measure} ${two(held[0])}, between ${two(held[1])} and ${two(held[2])}${ceiling ? `; at most ${two(ceiling[0])}` : ""}`
    : "not known yet";
  const drawing = svg("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", class: "bar-chart", role: "img", "aria-label": words });
  drawing.append(svg("rect", { x: 0, y: 2.5, width: 100, height: 3, rx: 1.5, class: "track" }));
  if (held) {
    drawing.append(svg("rect", { x: 0, y: 2.5, width: at(held[0]), height: 3, class: "filled" }));
    drawing.append(svg("rect", { x: at(held[1]), y: 1.5, width: Math.max(0.5, at(held[2]) - at(held[1])), height: 5, class: "interval" }));
  }
  if (ceiling) drawing.append(svg("rect", { x: at(ceiling[0]) - 0.4, y: 0, width: 0.8, height: 8, class: "ceiling" }));
  return h(
    "div",
    { class: "bar-of" },
    drawing,
    h("div", { class: "bar-ends muted", "aria-hidden": "true" }, h("span", {}, "chance"), held && h("b", {}, two(held[0])), h("span", {}, "perfect")),
  );
}

function curve(progress) {
  const points = progress.curve;
  const chance = progress.measure === "accuracy" ? 0.5 : 0;
  if (points.length < 2) return h("p", { class: "muted" }, "The learning curve comes after about 20 answers.");
  const [width, height, left, bottom] = [640, 260, 44, 34];
  const last = Math.max(progress.answers, points.at(-1)[0]);
  const x = (count) => left + ((width - left - 12) * Math.sqrt(count)) / Math.sqrt(last);
  const y = (value) => 10 + (height - bottom - 10) * (1 - Math.max(0, value - chance) / (1 - chance));
  const text = (content, attributes) => svg("text", attributes, content);
  const lines = [0, 0.25, 0.5, 0.75, 1].map((share) => chance + share * (1 - chance));
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, class: "curve", role: "img", "aria-labelledby": "curve-title" },
    svg("title", { id: "curve-title" }, `${progress.measure} by the number of answers that were learned`),
    ...lines.flatMap((value) => [
      svg("line", { x1: left, x2: width - 12, y1: y(value), y2: y(value), class: "grid-line" }),
      text(value.toFixed(2), { x: left - 8, y: y(value) + 4, class: "tick", "text-anchor": "end" }),
    ]),
    ...points.map(([count]) => text(String(count), { x: x(count), y: height - 12, class: "tick", "text-anchor": "middle" })),
    progress.ceiling &&
      svg("line", { x1: left, x2: width - 12, y1: y(progress.ceiling[0]), y2: y(progress.ceiling[0]), class: "ceiling-line" }),
    svg("polyline", { points: points.map(([count, value]) => `${x(count)},${y(value)}`).join(" "), class: "line" }),
    ...points.map(([count, value, error]) =>
      svg("line", { x1: x(count), x2: x(count), y1: y(value + 2 * error), y2: y(value - 2 * error), class: "error-line" }),
    ),
    ...points.map(([count, value]) => svg("circle", { cx: x(count), cy: y(value), r: 4, class: "dot" })),
  );
  if (progress.held_out) drawing.append(svg("circle", { cx: x(progress.answers), cy: y(progress.held_out[0]), r: 6, class: "now" }));
  return drawing;
}

function figure(name, interval, explanation) {
  return h(
    "div",
    { class: "figure" },
    h("h3", {}, name),
    h("p", { class: "value" }, interval ? two(interval[0]) : "\u2013"),
    h("p", { class: "muted" }, interval ? `between ${two(interval[1])} and ${two(interval[2])}` : "not known yet"),
    h("p", { class: "explanation" }, explanation),
  );
}

function spread(state) {
  const most = Math.max(1, ...state.stars);
  const bars = state.stars.map((count, index) =>
    h("div", { class: "column" }, h("span", { class: "muted" }, String(count)), columnOf(count / most), h("span", {}, String(index + 1))),
  );
  return h("div", { class: "columns", role: "img", "aria-label": `stars given: ${state.stars.map((n, i) => `${n} times ${i + 1}`).join(", ")}` }, ...bars);
}

const columnOf = (share) =>
  svg(
    "svg",
    { viewBox: "0 0 10 40", preserveAspectRatio: "none", class: "column-chart", "aria-hidden": "true" },
    svg("rect", { x: 0, y: 40 - 38 * share - 1, width: 10, height: 38 * share + 1, rx: 1, class: "filled" }),
  );

export function insight(main) {
  let shown = "";
  function update(state) {
    const { progress } = state;
    const now = JSON.stringify([progress, state.stars, state.answers]);
    if (now === shown) return;
    shown = now;
    const ofPairs = progress.measure === "accuracy";
    const held = "asked by chance, each predicted by a scorer that had not learned it.";
    const correlation = figure("Rank correlation", progress.correlation, `Of stars that were ${held}`);
    const accuracy = figure(
      "Right about pairs",
      progress.pair_accuracy,
      ofPairs ? `Of pairs that were ${held} Chance is 0.50.` : "Of two pictures, how often it knows which one you like better. Chance is 0.50.",
    );
    main.replaceChildren(
      h(
        "div",
        { class: "page" },
        h("h2", { class: "headline" }, heading[progress.status]),
        h("p", { class: "lead" }, progress.words || "Rate some pictures first."),
        progress.drift && h("p", { class: "note" }, progress.drift),
        h(
          "section",
          { class: "figures", "aria-label": "Figures" },
          ofPairs ? accuracy : correlation,
          ofPairs ? progress.correlation && correlation : accuracy,
          figure("Before you said it", progress.ahead, "The same, over what the scorer of that moment said before each answer came."),
          figure(
            "You with yourself",
            progress.agreement,
            `How far you agree with yourself, from ${progress.repeats} asked twice. ${progress.ceiling ? `So ${two(progress.ceiling[0])} is the most that can be reached.` : ""}`,
          ),
        ),
        h("section", { class: "card" }, h("h3", {}, "Learning curve"), curve(progress)),
        state.stars.some(Boolean) && h("section", { class: "card" }, h("h3", {}, "Stars that you gave"), spread(state)),
      ),
    );
  }
  return { update };
}
