// What the page asks the server, and the answers that wait until the server has acknowledged them.

export class Refused extends Error {}

async function read(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // a refusal may be plain text
  }
  if (response.status === 400 || response.status === 403 || response.status === 413) {
    throw new Refused(body.error || "The server refused this; load the page anew.");
  }
  if (!response.ok) throw new Error(`The server answered ${response.status}.`);
  return body;
}

export async function call(name, body) {
  const request = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  return read(await fetch(`/api/${name}`, request));
}

export async function sendTable(opinion, file) {
  const request = { method: "POST", headers: { "content-type": "text/csv" }, body: await file.text() };
  return read(await fetch(`/api/import?opinion=${encodeURIComponent(opinion)}`, request));
}

// Answers are kept in the browser until the server has them on its disk. Each has a token, so sending one twice counts once.
const KEY = "leco-outbox";
const listeners = new Set();
let sending = false;
let wait = 0;

const load = () => JSON.parse(localStorage.getItem(KEY) || "[]");
const save = (answers) => {
  localStorage.setItem(KEY, JSON.stringify(answers));
  for (const listener of listeners) listener(answers.length);
};

export const waiting = () => load().length;
export const onWaiting = (listener) => listeners.add(listener);

export function put(opinion, answer) {
  save([...load(), { opinion, ...answer }]);
  flush();
}

export async function flush(onRefused = report) {
  if (sending) return;
  sending = true;
  try {
    for (let batch = load(); batch.length; batch = load()) {
      const opinion = batch[0].opinion;
      const own = batch.filter((answer) => answer.opinion === opinion).slice(0, 50);
      const answers = own.map(({ token, mode, pictures, value }) => ({ token, mode, pictures, value }));
      const sent = new Set(own.map((answer) => answer.token));
      try {
        await call("rate", { opinion, answers });
        wait = 0;
        save(load().filter((answer) => !sent.has(answer.token)));
      } catch (error) {
        // what the disk refuses stays and is sent again; what is no answer would be refused for ever
        if (error instanceof Refused && !/cannot be written/.test(error.message)) {
          save(load().filter((answer) => !sent.has(answer.token)));
          onRefused(error.message);
        } else {
          onRefused(error instanceof Refused ? error.message : "The server does not answer. Your ratings are kept here and sent when it is back.");
          wait = Math.min(8000, 500 + 2 * wait);
          setTimeout(() => flush(onRefused), wait);
          break;
        }
      }
    }
  } finally {
    sending = false;
  }
}

let report = () => {};
export const onProblem = (listener) => (report = listener);
