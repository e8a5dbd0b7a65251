// From the ratings to a slider: one button, what it does, and what came of it.

import { call } from "./api.js";
import { h, svg, toast } from "./dom.js";

const STEPS = { scorer: "Learn the score", slider: "Train the slider", check: "Check it on pictures" };
const SAID = {
  starting: "It starts.",
  running: "It is being trained.",
  stopped: "Stopped. What it had learned is saved.",
  interrupted: "It was interrupted. Nothing that was saved is lost.",
  failed: "It could not be trained.",
  done: "Your slider is ready.",
};

export function train(main, app) {
  let shown = "";

  async function act(name) {
    try {
      await call(name, { opinion: app.opinion });
    } catch (error) {
      toast(error.message);
    }
    await app.refresh();
  }

  function update(state) {
    const now = JSON.stringify([state.run, state.answers, state.progress.status, state.trains_elsewhere]);
    if (now === shown || main.contains(document.activeElement?.closest?.("pre"))) return;
    shown = now;
    const open = [...main.querySelectorAll("details[open]")].map((own) => own.dataset.name);
    const focused = document.activeElement?.dataset?.focus;
    main.replaceChildren(h("div", { class: "page" }, ...content(state)));
    for (const name of open) main.querySelector(`details[data-name="${name}"]`)?.setAttribute("open", "");
    if (focused) main.querySelector(`[data-focus="${focused}"]`)?.focus();
  }

  function content(state) {
    const { run } = state;
    const busy = run && ["running", "starting"].includes(run.state);
    const begin = (words) =>
      h(
        "button",
        { type: "button", class: "primary", "data-focus": "begin", disabled: state.answers < 20 || state.trains_elsewhere, onclick: () => act("train") },
        words,
      );
    if (!run) {
      return [
        h("h2", { class: "headline" }, "Make the slider"),
        h("p", { class: "lead" }, state.progress.words || "Rate some pictures first."),
        h(
          "p",
          {},
          "A scorer learns your ratings, and a slider is trained from it: a LoRA that makes pictures more to your liking at weight +1, and less at -1. " +
            "Then it is checked on pictures. Every file and command is shown, so that you can do the same without this page.",
        ),
        state.answers < 20 && h("p", { class: "note" }, `Give at least 20 answers; you have ${state.answers}.`),
        state.trains_elsewhere && h("p", { class: "note" }, "Another opinion is being trained; one at a time."),
        h("div", { class: "actions left" }, begin("Train")),
      ];
    }
    const preview = run.state === "done" && run.files.includes("grid.png") ? "grid.png" : run.preview;
    return [
      h("h2", { class: "headline" }, SAID[run.state] || run.state),
      run.state === "running" && h("p", { class: "lead" }, "You may close this page; it goes on."),
      run.error && h("p", { class: "problem", role: "alert" }, run.error),
      run.state === "done" && h("p", { class: "lead" }, run.description),
      h("ol", { class: "steps" }, ...Object.entries(STEPS).map(([name, title]) => step(run, name, title))),
      h(
        "div",
        { class: "actions left" },
        busy && h("button", { type: "button", "data-focus": "stop", onclick: () => act("stop") }, "Stop"),
        ["stopped", "interrupted", "failed"].includes(run.state) &&
          h("button", { type: "button", class: "primary", "data-focus": "resume", onclick: () => act("resume") }, "Go on"),
        !busy && begin("Train anew"),
      ),
      ...(run.files.includes("slider.safetensors") && !busy ? [result(state)] : []),
      preview &&
        h(
          "section",
          { class: "card" },
          h("h3", {}, run.state === "done" ? "The same prompt and seed in each row, at several weights" : "So far, at weights -1, 0 and +1"),
          h("img", { class: "sheet", src: `${address(state, preview)}&v=${run.name}`, alt: "A grid of pictures: less to your liking on the left, more on the right" }),
        ),
      gains(run),
      run.warnings.length > 0 && h("section", { class: "card" }, h("h3", {}, "What it says"), h("ul", {}, ...run.warnings.map((words) => h("li", {}, words)))),
      files(run),
    ];
  }

  const address = (state, name) => `/run/${name}?opinion=${encodeURIComponent(state.opinion)}`;

  function step(run, name, title) {
    const done = run.done.includes(name);
    const now = run.step === name && run.state === "running";
    const at = run.progress[name];
    const words = done ? "done" : now ? (at?.step ? `step ${at.step} of at most ${at.of}` : "it begins") : "";
    const bar = at?.of && (now || done) ? h("progress", { max: at.of, value: done ? at.of : at.step, "aria-label": title }) : null;
    return h("li", { class: done ? "done" : now ? "now" : "", "aria-current": now ? "step" : null }, h("b", {}, title), h("span", { class: "muted" }, words), bar);
  }

  function result(state) {
    const { run } = state;
    return h(
      "section",
      { class: "card result" },
      h("h3", {}, "Use it"),
      h(
        "div",
        { class: "actions left" },
        h("a", { class: "button primary", href: address(state, "slider.safetensors"), download: "" }, "Download the slider"),
        run.files.includes("slider.json") && h("a", { class: "button", href: address(state, "slider.json"), download: "" }, "Its card (.json)"),
        run.files.includes("report.html") && h("a", { class: "button", href: address(state, "report.html"), target: "_blank", rel: "noopener" }, "The report"),
        run.files.includes("scorer.safetensors") && h("a", { class: "button", href: address(state, "scorer.safetensors"), download: "" }, "The scorer"),
      ),
      h(
        "dl",
        { class: "places" },
        h("dt", {}, "A1111, Forge"),
        h("dd", {}, "Put both files into ", h("code", {}, "models/Lora"), " and write ", h("code", {}, "<lora:slider:1>"), " into the prompt; -1 is less."),
        h("dt", {}, "ComfyUI"),
        h("dd", {}, "Put it into ", h("code", {}, "models/loras"), "; ", h("code", {}, "strength_model"), " is the weight."),
        h("dt", {}, "diffusers"),
        h("dd", {}, h("code", {}, 'pipe.load_lora_weights("slider.safetensors")')),
      ),
    );
  }

  function gains(run) {
    const of = (name) => [run.curves[`${name}gain_at_+1`] ?? [], run.curves[`${name}gain_at_-1`] ?? []];
    const [up, down] = of("running_");
    const measured = of("").flat();
    const judges = Object.keys(run.curves).filter((name) => name.startsWith("judge/") && name.endsWith("+1")).map((name) => name.slice(6, -11));
    const judged = judges.flatMap((name) => of(`judge/${name}/`).map((points) => ({ name, points })));
    if (up.length + down.length < 4) return null;
    const [width, height, left] = [640, 200, 40];
    const all = [...up, ...down, ...measured, ...judged.flatMap(({ points }) => points)];
    const last = Math.max(...all.map(([at]) => at), 1);
    const most = Math.max(0.5, ...all.map(([, gain]) => Math.abs(gain)));
    const x = (at) => left + ((width - left - 10) * at) / last;
    const y = (gain) => height / 2 - ((height / 2 - 14) * gain) / most;
    const line = (points, name) => svg("polyline", { class: name, points: points.map(([at, gain]) => `${x(at)},${y(gain)}`).join(" ") });
    return h(
      "section",
      { class: "card" },
      h("h3", {}, `What the score${judges.length ? " and the judges" : ""} gain${judges.length ? "" : "s"}, in within-prompt standard deviations`),
      svg(
        "svg",
        { viewBox: `0 0 ${width} ${height}`, class: "curve", role: "img", "aria-label": `gain at weight +1: ${up.at(-1)?.[1].toFixed(2)}, at -1: ${down.at(-1)?.[1].toFixed(2)}` },
        svg("line", { x1: left, x2: width - 10, y1: y(0), y2: y(0), class: "grid-line" }),
        ...[most, 0, -most].map((value) => svg("text", { x: left - 6, y: y(value) + 4, class: "tick", "text-anchor": "end" }, value.toFixed(1))),
        line(up, "line"),
        line(down, "line down"),
        ...measured.map(([at, gain]) => svg("circle", { cx: x(at), cy: y(gain), r: 4, class: "dot" })),
        ...judged.flatMap(({ name, points }) => [
          line(points, "line judge"),
          ...points.map(([at, gain]) => svg("circle", { cx: x(at), cy: y(gain), r: 3, class: "judge-dot" }, svg("title", {}, `${name} ${gain.toFixed(2)}`))),
        ]),
        svg("text", { x: width - 10, y: y(up.at(-1)?.[1] ?? 0) - 6, class: "tick", "text-anchor": "end" }, "at +1"),
        svg("text", { x: width - 10, y: y(down.at(-1)?.[1] ?? 0) + 14, class: "tick", "text-anchor": "end" }, "at -1"),
      ),
      h("p", { class: "muted" }, "Lines: as the training goes along. Dots: measured on pictures.", ...judges.map((name) => ` Dashed: ${name}, which it does not follow.`)),
    );
  }

  function files(run) {
    const block = (name, title, text) => h("details", { "data-name": name }, h("summary", {}, title), h("pre", { tabindex: "0" }, text));
    return h(
      "section",
      { class: "card quiet-card" },
      h("h3", {}, "Do the same without this page"),
      h("pre", { tabindex: "0" }, run.commands.join("\n")),
      ...Object.entries(run.toml).map(([name, text]) => block(name, `${name}.toml`, text)),
      block("log", "What the scripts printed", run.log),
    );
  }

  return { update };
}
