// The page: which opinion, which view, and what the server says every second or so.

import { call, flush, onProblem, onWaiting, Refused } from "./api.js";
import { h, openDialog, toast } from "./dom.js";
import { insight } from "./insight.js";
import { look } from "./look.js";
import { rate } from "./rate.js";
import { train } from "./train.js";

const views = { "#rate": rate, "#insight": insight, "#opinion-view": look, "#train": train };
const titles = { "#rate": "Rate", "#insight": "Insight", "#opinion-view": "Opinion", "#train": "Train" };
const select = document.getElementById("opinion");
const main = document.getElementById("view");
const app = { opinion: localStorage.getItem("leco-opinion") || "", state: null, refresh };
let view = null;
let polling = 0;
let unreachable = false;

async function refresh() {
  clearTimeout(polling);
  try {
    app.state = await call("state", { opinion: app.opinion });
    if (unreachable) toast("The server is back.");
    unreachable = false;
    flush();
    showOpinions();
    if (view) view.update?.(app.state);
    else show();
  } catch (error) {
    if (error instanceof Refused) {
      toast(error.message);
    } else if (!unreachable) {
      unreachable = true;
      toast("The server does not answer. Start it again with the same command; nothing is lost.");
    }
  }
  polling = setTimeout(refresh, document.hidden ? 8000 : 1200);
}

function showOpinions() {
  const names = app.state.opinions.map((own) => own.name).join("\n");
  if (select.dataset.names !== names) {
    select.dataset.names = names;
    select.replaceChildren(...app.state.opinions.map((own) => h("option", { value: own.name }, own.name)));
  }
  app.opinion = app.state.opinion;
  select.value = app.opinion;
}

function choose(name) {
  app.opinion = name;
  localStorage.setItem("leco-opinion", name);
  return refresh().then(show);
}

function show() {
  if (!app.state) return; // whose pictures it would ask for is not known yet; refresh shows it then
  const name = views[location.hash] ? location.hash : "#rate";
  view?.leave?.();
  document.title = `${titles[name]} - LECO score`;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  main.className = name.slice(1);
  main.replaceChildren();
  view = views[name](main, app);
  view.update?.(app.state);
}

function askForOpinion() {
  const name = h("input", { id: "name", required: true, maxlength: 40, autocomplete: "off", placeholder: "cosy" });
  const ten = h("input", { type: "checkbox", id: "ten" });
  const problem = h("p", { class: "problem", role: "alert" });
  const form = h(
    "form",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        try {
          const made = await call("opinions", { name: name.value, levels: ten.checked ? 10 : 5 });
          document.getElementById("dialog").close();
          await choose(made.name);
        } catch (error) {
          problem.textContent = error.message;
        }
      },
    },
    h("p", {}, "The same pictures, rated for something else. Its ratings, its scorer and its slider are its own."),
    h("label", { for: "name" }, "What do you rate?"),
    name,
    h("label", { class: "check" }, ten, "ten stars in place of five"),
    problem,
    h("div", { class: "actions" }, h("button", { class: "primary", type: "submit" }, "Begin")),
  );
  openDialog("New opinion", form);
}

function help() {
  const keys = [
    ["1 \u2026 5", "stars; with ten, 0 is ten"],
    ["\u2190 \u2192", "the left or the right one is better"],
    ["\u2193 or =", "both are equal"],
    ["Space", "skip"],
    ["Z", "take the last answer back"],
    ["S  P  G", "stars, pairs, grid"],
    ["?", "this"],
  ];
  openDialog(
    "Keys",
    h("dl", { class: "keys" }, ...keys.flatMap(([key, does]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, does)])),
    h(
      "p",
      { class: "muted" },
      "Rate quickly and by feeling. About one picture in fifteen comes a second time, so that the page learns how far you agree with yourself. " +
        "Every answer is on your disk before the next picture comes.",
    ),
  );
}

select.addEventListener("change", () => choose(select.value));
document.getElementById("new-opinion").addEventListener("click", askForOpinion);
document.getElementById("help").addEventListener("click", help);
addEventListener("hashchange", () => {
  show();
  main.focus({ preventScroll: true });
});
addEventListener("visibilitychange", () => document.hidden || refresh());
addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea, dialog");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "?") help();
  else view?.key?.(event);
});
onProblem((words) => toast(words));
onWaiting((count) => document.body.classList.toggle("unsent", count > 5));
if (new URLSearchParams(location.search).has("token")) history.replaceState(null, "", "/" + location.hash); // not into bookmarks
refresh();
