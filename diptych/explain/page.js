"use strict";
// Q tokens that look, K tokens looked at; p a weight, from 0 to 1.
const byId = (id) => document.getElementById(id);
const { layers, heads, queries, keys } = JSON.parse(byId("data").textContent);
const Q = queries.length, K = keys.length;
const bytes = Uint8Array.from(atob(byId("weights").textContent), (letter) => letter.charCodeAt(0));
const weight = (layer, head, q, k) => {
  const at = 2 * (((layer * heads + head) * Q + q) * K + k);
  return (bytes[at] + 256 * bytes[at + 1]) / 65535;
};
const chosen = { layer: 0, head: 0, q: null, k: null };
const now = (q, k) => weight(chosen.layer, chosen.head, q, k);

// --- colours -------------------------------------------------------------------------------------------------------

const rgb = (name) => {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
};
let low, high;
const shade = (p) => low.map((from, i) => Math.round(from + Math.sqrt(p) * (high[i] - from)));
const css = (p) => `rgb(${shade(p).join(" ")})`;
// Black or white, whichever is read better on a shade: their contrasts are equal at a luminance of 0.18.
const ink = (p) => {
  const [r, g, b] = shade(p).map((part) => (part / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#10151a" : "#ffffff";
};

function paint(canvas, layer, head) {
  canvas.width = K;
  canvas.height = Q;
  const pen = canvas.getContext("2d"), picture = pen.createImageData(K, Q);
  for (let q = 0, at = 0; q < Q; q++) {
    for (let k = 0; k < K; k++, at += 4) picture.data.set([...shade(weight(layer, head, q, k)), 255], at);
  }
  pen.putImageData(picture, 0, 0);
}

function repaint() {
  [low, high] = [rgb("--low"), rgb("--high")];
  const stops = [0, 0.0625, 0.25, 0.5625, 1].map((p) => `${css(p)} ${100 * p}%`);
  byId("ramp").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  maps.forEach((button, n) => paint(button.firstChild, Math.floor(n / heads), n % heads));
  drawMap();
  drawWords();
}

// --- making the page -----------------------------------------------------------------------------------------------

function made(tag, parent, text = "", name = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  if (name) element.className = name;
  parent.append(element);
  return element;
}

// One of many buttons is reached by Tab, the others from there by arrow keys, `across` in a row.
function roving(buttons, across, choose) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across };
  buttons.forEach((button, n) => {
    button.tabIndex = n ? -1 : 0;
    button.addEventListener("focus", () => buttons.forEach((other) => (other.tabIndex = other === button ? 0 : -1)));
    button.addEventListener("keydown", (event) => {
      const to = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : n + steps[event.key];
      if (!buttons[to]) return;
      event.preventDefault();
      buttons[to].focus();
      choose(to);
    });
  });
}

function makeOverview() {
  const grid = byId("overview");
  grid.style.gridTemplateColumns = `1.4em repeat(${heads}, minmax(0, 1fr))`;
  made("span", grid);
  for (let head = 0; head < heads; head++) made("span", grid, head + 1, "name head");
  const buttons = [];
  for (let n = 0; n < layers * heads; n++) {
    const [layer, head] = [Math.floor(n / heads), n % heads];
    if (head === 0) made("span", grid, layer + 1, "name layer");
    const button = made("button", grid);
    button.type = "button";
    button.title = `layer ${layer + 1}, head ${head + 1}`;
    button.setAttribute("aria-label", button.title);
    made("canvas", button);
    button.addEventListener("click", () => {
      choose(layer, head);
      // Where the map is below the fold, as on a phone, a click would seem to do nothing.
      const panel = byId("one");
      if (panel.getBoundingClientRect().top > 0.6 * innerHeight) panel.scrollIntoView();
    });
    buttons.push(button);
  }
  roving(buttons, heads, (n) => choose(Math.floor(n / heads), n % heads));
  return buttons;
}

function makeSelects() {
  for (const [id, count] of [["layer", layers], ["head", heads]]) {
    for (let n = 0; n < count; n++) made("option", byId(id), n + 1).value = n;
    byId(id).addEventListener("change", () => choose(Number(byId("layer").value), Number(byId("head").value)));
  }
}

function makeLabels(id, labels) {
  return labels.map((label, n) => {
    const span = made("span", byId(id));
    span.style.setProperty("--at", n);
    span.title = label;
    made("bdi", span, label);
    return span;
  });
}

function makeWords() {
  const buttons = keys.map((label, n) => {
    const button = made("button", byId("words"));
    button.type = "button";
    made("bdi", button, label);
    made("small", button);
    for (const kind of ["pointerenter", "click"]) button.addEventListener(kind, () => point(n, null));
    return button;
  });
  roving(buttons, 1, (n) => point(n, null));
  for (const radio of document.getElementsByName("way")) {
    radio.addEventListener("change", () => point(chosen.q, null));
  }
  return buttons;
}

// --- choosing a head -----------------------------------------------------------------------------------------------

function choose(layer, head) {
  Object.assign(chosen, { layer, head });
  maps.forEach((button, n) => button.setAttribute("aria-pressed", n === layer * heads + head));
  byId("layer").value = layer;
  byId("head").value = head;
  byId("chosen").textContent = `Layer ${layer + 1}, head ${head + 1}`;
  drawMap();
  if (chosen.q !== null) point(chosen.q, chosen.k);
}

function drawMap() {
  paint(byId("map"), chosen.layer, chosen.head);
}

function fit() {
  const longest = Math.max(...tos.map((label) => label.firstChild.offsetWidth));
  byId("sheet").style.setProperty("--tall", `min(${longest + 6}px, 6.6em)`);
  const room = byId("scroller").clientWidth - byId("from").offsetWidth - 18;
  byId("sheet").style.setProperty("--cell", `${Math.max(14, Math.min(34, Math.floor(room / K)))}px`);
}

// --- choosing a cell or a word -------------------------------------------------------------------------------------

const way = () => document.querySelector("[name=way]:checked").value;
const figure = (p) => p.toFixed(4);
// The word that the others are shaded for, and by what: where it looks, or how they look at it.
const centre = () => (way() === "in" ? chosen.k ?? chosen.q : chosen.q);
const strip = () => keys.map((_, n) => (way() === "in" ? now(n, centre()) : now(centre(), n)));

// k is null where a word is chosen, and not a cell.
function point(q, k) {
  if (q === null) return;
  Object.assign(chosen, { q, k });
  const cursor = byId("cursor");
  cursor.hidden = k === null;
  cursor.style.setProperty("--q", q);
  cursor.style.setProperty("--k", k ?? 0);
  froms.forEach((label, n) => label.classList.toggle("on", n === q && (k !== null || way() === "out")));
  tos.forEach((label, n) => label.classList.toggle("on", k === null ? n === q && way() === "in" : n === k));
  tell();
  drawWords();
}

function tell() {
  const { q, k } = chosen, line = byId("readout");
  if (k !== null) {
    line.textContent = "";
    made("bdi", line, queries[q]);
    line.append(" → ");
    made("bdi", line, keys[k]);
    line.append(": ");
    made("b", line, figure(now(q, k)));
    made("span", line, ` token ${q + 1} looks at token ${k + 1}`, "muted small");
  }
  const most = strip().map((p, n) => [p, n]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, 3);
  const told = byId("told");
  told.textContent = "";
  made("bdi", told, keys[centre()]);
  told.append(way() === "out" ? " looks most at " : " is looked at most by ");
  most.forEach(([p, n], place) => {
    told.append(place ? ", " : "");
    made("bdi", told, keys[n]);
    told.append(" ");
    made("b", told, figure(p));
  });
}

function drawWords() {
  if (chosen.q === null) return;
  strip().forEach((p, n) => {
    const { style, lastChild } = words[n];
    style.background = css(p);
    style.color = ink(p);
    lastChild.textContent = (100 * p).toFixed(p < 0.0995 && p >= 0.0005 ? 1 : 0);
    words[n].setAttribute("aria-pressed", n === centre());
  });
}

function pointAt(event) {
  const box = byId("map").getBoundingClientRect();
  const cell = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
  const q = cell((event.clientY - box.top) / box.height, Q), k = cell((event.clientX - box.left) / box.width, K);
  if (q !== chosen.q || k !== chosen.k) point(q, k);
}

function stepFrom(event) {
  const q = chosen.q ?? 0, k = chosen.k ?? 0;
  const to = {
    ArrowUp: [q - 1, k], ArrowDown: [q + 1, k], ArrowLeft: [q, k - 1], ArrowRight: [q, k + 1],
    Home: [q, 0], End: [q, K - 1],
  }[event.key];
  if (!to) return;
  event.preventDefault();
  point(Math.max(0, Math.min(Q - 1, to[0])), Math.max(0, Math.min(K - 1, to[1])));
  byId("cursor").scrollIntoView({ block: "nearest", inline: "nearest" });
}

// --- and begin -----------------------------------------------------------------------------------------------------

byId("sheet").style.setProperty("--queries", Q);
byId("sheet").style.setProperty("--keys", K);
const maps = makeOverview(), froms = makeLabels("from", queries), tos = makeLabels("to", keys), words = makeWords();
makeSelects();
byId("field").addEventListener("pointermove", pointAt);
byId("field").addEventListener("pointerdown", pointAt);
byId("field").addEventListener("keydown", stepFrom);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
addEventListener("resize", fit);
fit();
repaint();
choose(0, 0);
point(0, null);
