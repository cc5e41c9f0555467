"use strict";
// Models, sorting, filtering and zooming. The page is complete without it; nothing here is ever parsed as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const { metrics, models, prompts } = data;
const PAGE = 24;
const MAX_ZOOM = 16;
const byId = (id) => document.getElementById(id);
const list = byId("cards");
const toolbar = byId("toolbar");
const zoom = byId("zoom");
const stage = byId("stage");
const nodes = [...list.children]; // those of the page itself; others are made when they are shown
const lower = prompts.map((prompt) => prompt.text.toLowerCase());
const isKnown = ([baseline, value]) => baseline !== null && value !== null;
let model = 0; // of models[1:], as everywhere on the page
let matching = [];
let limit = PAGE;
let current = 0;
let shown = 0;

// --- numbers ---------------------------------------------------------------------------------------------------------

function format(value, places, signed = false) {
  if (value === null) return "–";
  const size = Math.abs(value);
  const text = places === null ? size.toExponential(2) : size.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
  if (!/[1-9]/.test(text.split("e")[0])) return text;
  return (value < 0 ? "−" : signed ? "+" : "") + text;
}

// One pair deserves a digit more than the mean of many.
const places = (metric) => (metric.places === null ? null : Math.max(2, metric.places));
const both = (metric, number) => [metric.values[number][0], metric.values[number][model + 1]];
const difference = (metric, number) => { const pair = both(metric, number); return isKnown(pair) ? pair[1] - pair[0] : null; };
const gain = (metric, number) => { const value = difference(metric, number); return value === null ? null : metric.higherIsBetter ? value : -value; };
const kind = (value) => (value === null || value === 0 ? "same" : value > 0 ? "better" : "worse");

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

// --- models ----------------------------------------------------------------------------------------------------------

function choose(number) {
  model = number;
  for (const block of document.querySelectorAll(".of-model")) block.hidden = Number(block.dataset.model) !== model;
  for (const row of document.querySelectorAll("[data-row]")) row.classList.toggle("chosen", Number(row.dataset.row) === model);
  for (const form of [byId("models"), toolbar, byId("bar")]) if (form?.elements.model) form.elements.model.value = String(model);
}

// --- the wall --------------------------------------------------------------------------------------------------------

function card(number) {
  if (nodes[number]) return nodes[number];
  const [row, seed] = data.cards[number];
  const made = element("li", "card");
  const button = element("button", "");
  button.type = "button";
  button.ariaLabel = `Compare pair ${number + 1}, seed ${seed}`;
  button.append(...data.sources[number].map((source, place) => {
    const image = element("img", "");
    Object.assign(image, { decoding: "async", loading: "lazy", alt: models[place], width: data.size[0], height: data.size[1], src: source });
    const shot = element("span", "shot");
    shot.append(image, element("small", "", models[place]));
    return shot;
  }));
  const prompt = element("p", "prompt");
  prompt.dir = "auto";
  const { text } = prompts[row];
  prompt.append(element("bdi", "", text.length > data.long ? `${text.slice(0, data.long)}…` : text));
  made.append(button, element("p", "scores"), prompt);
  nodes[number] = made;
  return made;
}

function arrange() {
  const form = new FormData(toolbar);
  const metric = metrics[Number(form.get("metric"))];
  const wanted = form.get("text").trim().toLowerCase();
  const category = form.get("category") ?? "";
  const outcome = form.get("outcome");
  const known = (value) => value ?? -Infinity;
  const ranks = {
    random: (n) => -n,
    best: (n) => known(gain(metric, n)),
    worst: (n) => (gain(metric, n) === null ? -Infinity : -gain(metric, n)),
    changed: (n) => (gain(metric, n) === null ? -Infinity : Math.abs(gain(metric, n))),
    disagreement: (n) => known(data.disagreement[model][n]),
  };
  const fits = (_, n) => {
    const [row] = data.cards[n];
    return lower[row].includes(wanted) && (!category || prompts[row].category === category) && (!outcome || (gain(metric, n) !== null && kind(gain(metric, n)) === outcome));
  };
  const keys = data.cards.map((_, n) => ranks[form.get("order")](n));
  matching = data.cards.map((_, n) => n).filter((n) => fits(null, n)).sort((a, b) => keys[b] - keys[a] || a - b);
  toolbar.elements.count.value = matching.length === 1 ? "1 pair" : `${matching.length.toLocaleString("en")} pairs`;
  byId("empty").hidden = matching.length > 0;
  list.classList.toggle("all", form.has("all"));
  list.replaceChildren();
  shown = 0;
  fill(limit);
}

function fill(amount) {
  const metric = metrics[Number(toolbar.elements.metric.value)];
  const all = list.classList.contains("all");
  const more = matching.slice(shown, amount);
  list.append(...more.map((n) => label(card(n), metric, n, all)));
  shown += more.length;
  byId("more").hidden = shown >= matching.length;
  byId("more").textContent = `Show ${Math.min(PAGE, matching.length - shown)} more`;
}

function label(node, metric, number, all) {
  node.querySelectorAll(".shot").forEach((shot, place) => { shot.hidden = !all && place !== 0 && place !== model + 1; });
  const [baseline, value] = both(metric, number);
  node.querySelector(".scores").replaceChildren(
    element("span", "", `${format(baseline, places(metric))} → ${format(value, places(metric))}`),
    element("b", kind(gain(metric, number)), format(difference(metric, number), places(metric), true)),
  );
  node.dataset.number = number;
  return node;
}

// --- one pair --------------------------------------------------------------------------------------------------------

const sources = (number) => (data.sources ? data.sources[number] : [...nodes[number].querySelectorAll("img")].map((image) => image.src));

function show(number, { keep = false } = {}) {
  current = number;
  const [row, seed] = data.cards[number];
  const prompt = prompts[row];
  const urls = sources(number);
  [[byId("zoom-left"), 0], [byId("zoom-right"), model + 1]].forEach(([image, place]) => {
    image.src = urls[place];
    image.alt = models[place];
    image.nextElementSibling.textContent = models[place];
  });
  const text = byId("zoom-prompt");
  text.textContent = prompt.text.length > data.long ? `${prompt.text.slice(0, data.long)}…` : prompt.text;
  byId("whole").hidden = prompt.text.length <= data.long;
  byId("zoom-facts").textContent = `Prompt ${prompt.number}${prompt.category ? ` · ${prompt.category}` : ""} · seed ${seed}`;
  const siblings = data.cards.flatMap((other, n) => (other[0] === row ? [n] : [])).sort((a, b) => data.cards[a][2] - data.cards[b][2]);
  byId("seeds").replaceChildren(...siblings.map((n) => {
    const button = element("button", "quiet", `Seed ${data.cards[n][2] + 1}`);
    button.type = "button";
    button.dataset.card = n;
    if (n === number) button.setAttribute("aria-current", "true");
    return button;
  }));
  const place = matching.indexOf(number);
  byId("position").value = place < 0 ? "" : `${place + 1} / ${matching.length}`;
  byId("zoom-model").textContent = models[model + 1];
  byId("zoom-scores").tBodies[0].replaceChildren(...metrics.map((metric) => {
    const line = document.createElement("tr");
    const [baseline, value] = both(metric, number);
    const heading = element("th", "", metric.name);
    heading.scope = "row";
    const change = element("td", "num");
    change.append(element("b", kind(gain(metric, number)), format(difference(metric, number), places(metric), true)));
    line.append(heading, element("td", "num", format(baseline, places(metric))), element("td", "num", format(value, places(metric))), change);
    return line;
  }));
  if (!keep) { cut(50); look(1, 0, 0); }
  if (!zoom.open) { zoom.showModal(); byId("cut").focus(); }
  history.replaceState(null, "", `#p=${prompt.number}&s=${seed}&m=${encodeURIComponent(models[model + 1])}`);
}

function step(by) {
  if (!matching.length) return;
  const place = matching.indexOf(current);
  show(matching[(Math.max(place, by > 0 ? -1 : 0) + by + matching.length) % matching.length]);
}

function cut(value) {
  byId("cut").value = value;
  stage.style.setProperty("--cut", `${byId("cut").value}%`);
}

// Both images are scaled and moved alike. x and y are in per cent of a frame, so that they mean the same in both.
const view = { zoom: 1, x: 0, y: 0 };

function look(factor, x, y) {
  view.zoom = Math.min(MAX_ZOOM, Math.max(1, factor));
  const clamp = (value) => Math.min(0, Math.max(100 * (1 - view.zoom), value));
  view.x = clamp(x);
  view.y = clamp(y);
  stage.style.setProperty("--zoom", view.zoom);
  stage.style.setProperty("--x", `${view.x}%`);
  stage.style.setProperty("--y", `${view.y}%`);
  stage.classList.toggle("zoomed", view.zoom > 1);
  byId("factor").value = `${Number(view.zoom.toFixed(1))}×`;
}

function zoomBy(factor, x = 0.5, y = 0.5) {
  const next = Math.min(MAX_ZOOM, Math.max(1, view.zoom * factor));
  const keep = (offset, at) => 100 * at - ((100 * at - offset) * next) / view.zoom;
  look(next, keep(view.x, x), keep(view.y, y));
}

// Where a point of the screen is in the frame below it, from 0 to 1.
function within({ clientX, clientY }) {
  const boxes = [...stage.querySelectorAll(".frame")].map((frame) => frame.getBoundingClientRect());
  const box = boxes.findLast((it) => clientX >= it.left) ?? boxes[0];
  return { x: (clientX - box.left) / box.width, y: (clientY - box.top) / box.height, box };
}

const pointers = new Map();
let cutting = false;

stage.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  event.preventDefault();
  stage.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  const at = within(event);
  const near = Math.abs(at.x * at.box.width - (byId("cut").value / 100) * at.box.width) < 24;
  cutting = !stage.classList.contains("side") && (view.zoom === 1 || near);
  if (cutting) cut(100 * at.x);
  byId("cut").focus({ preventScroll: true });
});
stage.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const { box } = within(event);
  if (pointers.size === 2) {
    const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, it]) => it);
    const distance = (it) => Math.hypot(it.clientX - other.clientX, it.clientY - other.clientY) || 1;
    const middle = within({ clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 });
    zoomBy(distance(event) / distance(before), middle.x, middle.y);
  } else if (cutting) {
    cut(100 * within(event).x);
  } else if (view.zoom > 1) {
    look(view.zoom, view.x + (100 * (event.clientX - before.clientX)) / box.width, view.y + (100 * (event.clientY - before.clientY)) / box.height);
  }
  pointers.set(event.pointerId, event);
});
for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, (event) => pointers.delete(event.pointerId));
stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  const { x, y } = within(event);
  zoomBy(1.0015 ** -event.deltaY, x, y);
}, { passive: false });

// --- links and copies ------------------------------------------------------------------------------------------------

function follow() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (!wanted.has("p")) return;
  const number = models.indexOf(wanted.get("m")) - 1;
  if (number >= 0) { choose(number); arrange(); }
  const ofPrompt = data.cards.flatMap(([row], n) => (String(prompts[row].number) === wanted.get("p") ? [n] : []));
  const found = ofPrompt.find((n) => data.cards[n][1] === wanted.get("s")) ?? ofPrompt[0];
  if (found === undefined) tell(`Prompt ${Number(wanted.get("p")) || ""} is not among the images of this page.`);
  else show(found);
}

function tell(text) {
  byId("told").textContent = text;
  (zoom.open ? zoom : document.body).append(byId("told")); // what is outside an open dialog is not read out
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => { byId("told").textContent = ""; }, 4000);
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch (error) { // not there, or not allowed, as on pages opened from disk in some browsers
    const area = element("textarea", "hidden");
    area.value = text;
    (zoom.open ? zoom : document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) { tell(`This browser lets no page copy: ${error.message}`); return; }
  }
  tell(`${what} copied`);
}

// --- what people do --------------------------------------------------------------------------------------------------

document.addEventListener("input", (event) => {
  if (event.target.name !== "model") return;
  choose(Number(event.target.value));
  arrange();
  if (zoom.open) show(current, { keep: true });
});
byId("models")?.addEventListener("submit", (event) => event.preventDefault());
toolbar.addEventListener("submit", (event) => event.preventDefault());
toolbar.addEventListener("input", (event) => { if (event.target.name !== "model") { limit = PAGE; arrange(); } });
byId("more").addEventListener("click", () => {
  const first = shown;
  limit += PAGE;
  fill(limit);
  list.children[first]?.querySelector("button").focus({ preventScroll: true });
});
list.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) show(Number(button.parentElement.dataset.number));
});
byId("cut").addEventListener("input", (event) => cut(event.target.value));
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("larger").addEventListener("click", () => zoomBy(1.5));
byId("smaller").addEventListener("click", () => zoomBy(1 / 1.5));
byId("fit").addEventListener("click", () => look(1, 0, 0));
byId("seeds").addEventListener("click", (event) => { if (event.target.dataset.card) show(Number(event.target.dataset.card)); });
byId("whole").addEventListener("click", () => {
  byId("zoom-prompt").textContent = prompts[data.cards[current][0]].text;
  byId("whole").hidden = true;
});
byId("copy-table").addEventListener("click", () => copy(data.markdown[model], "Table"));
byId("copy-link").addEventListener("click", () => copy(location.href, "Link"));
zoom.addEventListener("change", (event) => { if (event.target.name === "view") stage.classList.toggle("side", event.target.value === "side"); });
zoom.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const move = { ArrowLeft: [10, 0], ArrowRight: [-10, 0], ArrowUp: [0, 10], ArrowDown: [0, -10] }[event.key];
  const keys = { j: () => step(1), k: () => step(-1), "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: () => look(1, 0, 0) };
  if (keys[event.key]) keys[event.key]();
  else if (move && event.shiftKey) look(view.zoom, view.x + move[0], view.y + move[1]);
  else return;
  event.preventDefault();
});
zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });
zoom.addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
addEventListener("hashchange", follow);

choose(0);
arrange();
follow();
