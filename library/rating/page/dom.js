// Elements without HTML strings: whatever a prompt or a name holds, it is text.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  fill(element, attributes, children);
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  fill(element, attributes, children);
  return element;
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
}

let gone;
export function toast(text, action) {
  const place = document.getElementById("toast");
  clearTimeout(gone);
  place.replaceChildren(text, ...(action ? [h("button", { type: "button", onclick: action.run }, action.name)] : []));
  place.classList.add("shown");
  gone = setTimeout(() => place.classList.remove("shown"), action ? 8000 : 5000);
}

export function openDialog(title, ...content) {
  const dialog = document.getElementById("dialog");
  const close = h("button", { type: "button", class: "icon close", "aria-label": "Close", onclick: () => dialog.close() }, "\u00d7");
  dialog.replaceChildren(h("h2", { id: "dialog-title" }, title), close, ...content);
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  dialog.showModal();
  return dialog;
}

export const source = (picture) => `/pictures/${picture.id}`;

// A name of its own for an answer. randomUUID is there only on secure addresses.
export const newToken = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

export const two = (value) => (value === null || value === undefined ? "\u2013" : value.toFixed(2));
