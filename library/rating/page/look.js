// What the scorer made of an opinion: the pictures it likes most and least, where it disagrees, and the tables.

import { call, sendTable } from "./api.js";
import { h, newToken, openDialog, source, toast, two } from "./dom.js";
import { starButtons } from "./rate.js";

export function look(main, app) {
  let answers = -1;
  let asked = 0;

  async function load(state) {
    answers = state.answers;
    asked = Date.now();
    let seen;
    try {
      seen = await call("look", { opinion: app.opinion });
    } catch {
      return;
    }
    const focused = document.activeElement?.dataset?.id;
    main.replaceChildren(
      h(
        "div",
        { class: "page" },
        row("It thinks you like these most", seen.most, "Rate about ten pictures, and they stand here."),
        row("and these least", seen.least),
        row("Where you and it disagree most", seen.apart, "", true),
        tables(state),
      ),
    );
    if (focused) main.querySelector(`[data-id="${focused}"]`)?.focus();
  }

  function row(title, pictures, empty = "", apart = false) {
    const shown = pictures.map((own) =>
      h(
        "button",
        { type: "button", class: "thumb", "data-id": `${title}-${own.id}`, onclick: () => correct(own) },
        h("img", { src: source(own), alt: own.prompt || "picture", loading: "lazy", width: own.width, height: own.height }),
        h("span", { class: "muted" }, label(own, apart)),
      ),
    );
    return h("section", {}, h("h2", {}, title), shown.length ? h("div", { class: "thumbs" }, ...shown) : h("p", { class: "muted" }, empty));
  }

  function label(own, apart) {
    if (apart) return `you ${own.stars}, it ${own.expected}`;
    return own.stars ? `you gave ${own.stars}` : "not rated";
  }

  function correct(own) {
    const give = async (value) => {
      try {
        await call("correct", { opinion: app.opinion, picture: own.id, value, token: newToken() });
        document.getElementById("dialog").close();
        toast(`Now ${value} of ${app.state.levels}.`);
        await app.refresh();
        load(app.state);
      } catch (error) {
        toast(error.message);
      }
    };
    const small = Math.max(own.width, own.height) <= 128 ? "small-picture" : "";
    openDialog(
      own.stars ? "Rate it anew" : "Rate it",
      h("figure", {}, h("img", { src: source(own), alt: own.prompt || "picture", class: small, width: own.width, height: own.height })),
      h("p", { class: "muted" }, own.prompt),
      h("p", {}, own.stars ? `You gave ${own.stars}; the scorer expects ${own.expected}.` : `The scorer expects ${own.expected}, worth ${two(own.worth)} \u00b1 ${two(own.unsure)}.`),
      starButtons(app.state.levels, give),
    );
  }

  function tables(state) {
    const file = h("input", { type: "file", accept: ".csv,text/csv", id: "table", class: "hidden", tabindex: "-1" });
    file.addEventListener("change", async () => {
      if (!file.files.length) return;
      try {
        const { new: count, missing } = await sendTable(app.opinion, file.files[0]);
        toast(`${count} answers are new.${missing ? ` ${missing} rows name other pictures.` : ""}`);
        app.refresh();
      } catch (error) {
        toast(error.message);
      }
      file.value = "";
    });
    const address = (name) => `/tables/${name}.csv?opinion=${encodeURIComponent(state.opinion)}`;
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Your ratings as tables"),
      h("p", { class: "muted" }, "In the layouts that train_latent_scorer.py reads."),
      h(
        "div",
        { class: "actions left" },
        h("a", { class: "button", href: address("ratings"), download: "ratings.csv" }, "Stars (ratings.csv)"),
        h("a", { class: "button", href: address("pairs"), download: "pairs.csv" }, "Pairs (pairs.csv)"),
        h("button", { type: "button", onclick: () => file.click() }, "Take in a table \u2026"),
        h("label", { class: "hidden", for: "table" }, "Table of ratings"),
        file,
      ),
    );
  }

  return {
    update(state) {
      if (document.getElementById("dialog").open) return;
      if (state.answers !== answers || Date.now() - asked > 15000) load(state);
    },
  };
}
