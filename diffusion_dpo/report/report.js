"use strict";
// Sorting, filtering and zooming. The page is complete without it; nothing here is ever parsed as HTML.

const { metrics } = JSON.parse(document.getElementById("data").textContent);
const PAGE = 24;
const byId = (id) => document.getElementById(id);
const list = byId("cards");
const cards = [...list.children];
const texts = cards.map((card) => card.querySelector(".prompt").textContent.toLowerCase());
const toolbar = byId("toolbar");
const zoom = byId("zoom");
const isMetricKnown = ([before, after]) => before !== null && after !== null;
let matching = [];
let limit = PAGE;
let current = 0;

function format(value, places, signed = false) {
  if (value === null) return "–";
  const size = Math.abs(value);
  const text = places === null ? size.toExponential(2) : size.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
  if (!/[1-9]/.test(text.split("e")[0])) return text;
  return (value < 0 ? "−" : signed ? "+" : "") + text;
}

// One pair deserves a digit more than the mean of many.
const places = (metric) => (metric.places === null ? null : Math.max(2, metric.places));
const difference = (metric, number) => (isMetricKnown(metric.values[number]) ? metric.values[number][1] - metric.values[number][0] : null);
const gain = (metric, number) => { const value = difference(metric, number); return value === null ? null : metric.higherIsBetter ? value : -value; };
const kind = (value) => (value === null || value === 0 ? "same" : value > 0 ? "better" : "worse");

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

function arrange() {
  const form = new FormData(toolbar);
  const metric = metrics[Number(form.get("metric"))];
  const wanted = form.get("text").trim().toLowerCase();
  const ranks = { random: (n) => -n, best: (n) => gain(metric, n), worst: (n) => -gain(metric, n), changed: (n) => Math.abs(gain(metric, n)) };
  const rank = ranks[form.get("order")];
  const key = (n) => (form.get("order") !== "random" && gain(metric, n) === null ? -Infinity : rank(n));
  matching = cards.map((_, n) => n).filter((n) => texts[n].includes(wanted)).sort((a, b) => key(b) - key(a) || a - b);
  const shown = new Set(matching.slice(0, limit));
  cards.forEach((card, n) => { card.hidden = !shown.has(n); });
  list.append(...matching.slice(0, limit).map((n) => cards[n]));
  for (const n of shown) label(cards[n], metric, n);
  toolbar.elements.count.value = matching.length === 1 ? "1 pair" : `${matching.length} pairs`;
  byId("empty").hidden = matching.length > 0;
  byId("more").hidden = matching.length <= limit;
  byId("more").textContent = `Show ${Math.min(PAGE, matching.length - limit)} more`;
}

function label(card, metric, number) {
  const [before, after] = metric.values[number];
  card.querySelector(".scores").replaceChildren(
    element("span", "", `${format(before, places(metric))} → ${format(after, places(metric))}`),
    element("b", kind(gain(metric, number)), format(difference(metric, number), places(metric), true)),
  );
}

function show(position) {
  current = (position + matching.length) % matching.length;
  const number = matching[current];
  const card = cards[number];
  const [before, after] = card.querySelectorAll("img");
  byId("zoom-before").src = before.src;
  byId("zoom-after").src = after.src;
  byId("zoom-prompt").textContent = card.querySelector(".prompt").textContent;
  byId("zoom-seed").textContent = card.querySelector(".seed").textContent;
  byId("position").value = `${current + 1} / ${matching.length}`;
  byId("zoom-scores").tBodies[0].replaceChildren(...metrics.map((metric) => {
    const row = document.createElement("tr");
    const [low, high] = metric.values[number];
    const heading = element("th", "", metric.name);
    heading.scope = "row";
    const change = element("td", "num", "");
    change.append(element("b", kind(gain(metric, number)), format(difference(metric, number), places(metric), true)));
    row.append(heading, element("td", "num", format(low, places(metric))), element("td", "num", format(high, places(metric))), change);
    return row;
  }));
  cut(50);
}

function cut(value) {
  byId("cut").value = value;
  byId("stage").style.setProperty("--cut", `${value}%`);
}

toolbar.addEventListener("submit", (event) => event.preventDefault());
toolbar.addEventListener("input", () => { limit = PAGE; arrange(); });
byId("more").addEventListener("click", () => { limit += PAGE; arrange(); });
list.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  show(matching.indexOf(Number(button.parentElement.dataset.number)));
  zoom.showModal();
  byId("cut").focus();
});
byId("cut").addEventListener("input", (event) => cut(event.target.value));
byId("previous").addEventListener("click", () => show(current - 1));
byId("next").addEventListener("click", () => show(current + 1));
zoom.addEventListener("change", (event) => { if (event.target.name === "view") byId("stage").classList.toggle("side", event.target.value === "side"); });
zoom.addEventListener("keydown", (event) => {
  if (event.key === "j") show(current + 1);
  if (event.key === "k") show(current - 1);
});
zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });

arrange();
