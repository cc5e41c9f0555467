"use strict";
// Reading values off the curves, and enlarging previews. The page is complete without it; nothing is parsed as HTML.

const { charts } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

for (const figure of document.querySelectorAll(".trace")) {
  const { names, x, steps, values } = charts[Number(figure.dataset.number)];
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const output = figure.querySelector("output");
  let place = -1;

  const show = (to) => {
    place = Math.max(0, Math.min(x.length - 1, to));
    cursor.setAttribute("x1", x[place]);
    cursor.setAttribute("x2", x[place]);
    cursor.setAttribute("visibility", "visible");
    const shown = values[place].map((value, i) => (names.length > 1 ? `${names[i]} ${value}` : value));
    output.value = `step ${steps[place]}: ${shown.join(", ")}`;
  };
  const hide = () => { cursor.setAttribute("visibility", "hidden"); output.value = ""; place = -1; };
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    return x.reduce((best, value, i) => (Math.abs(value - at) < Math.abs(x[best] - at) ? i : best), 0);
  };

  svg.addEventListener("pointermove", (event) => show(nearest(event)));
  svg.addEventListener("pointerdown", (event) => show(nearest(event)));
  svg.addEventListener("pointerleave", () => { if (document.activeElement !== svg) hide(); });
  svg.addEventListener("focus", () => { if (place < 0) show(x.length - 1); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: x.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}

const viewer = byId("viewer");
if (viewer) {
  const film = byId("film");
  const buttons = [...film.querySelectorAll("button")];
  const WAYS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  let current = buttons[0];
  const at = (button) => [Number(button.dataset.row), Number(button.dataset.column)];

  // The next image that way: of the same prompt along the steps, of the same step along the prompts.
  const beside = (button, [down, right]) => {
    const [row, column] = at(button);
    const ahead = (other) => (right ? (at(other)[1] - column) * right : (at(other)[0] - row) * down);
    const same = (other) => (right ? at(other)[0] === row : at(other)[1] === column);
    return buttons.filter((other) => same(other) && ahead(other) > 0).sort((a, b) => ahead(a) - ahead(b))[0];
  };
  const show = (button) => {
    if (!button) return;
    current = button;
    const image = button.querySelector("img");
    const [row, column] = at(button);
    byId("viewer-image").src = image.src;
    for (const side of ["width", "height"]) byId("viewer-image").setAttribute(side, image.getAttribute(side));
    byId("viewer-step").value = film.querySelectorAll("thead th")[column].textContent;
    byId("viewer-prompt").textContent = film.querySelectorAll(".caption")[row].textContent;
    byId("viewer-image").alt = `${byId("viewer-step").value}: ${byId("viewer-prompt").textContent}`;
    // Not `disabled`: a button that is, while it has the focus, swallows the arrow keys.
    byId("back").ariaDisabled = String(!beside(button, WAYS.ArrowLeft));
    byId("on").ariaDisabled = String(!beside(button, WAYS.ArrowRight));
  };

  film.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    show(button);
    viewer.showModal();
  });
  film.addEventListener("keydown", (event) => {
    const way = WAYS[event.key];
    if (!way || event.target.tagName !== "BUTTON") return;
    event.preventDefault();
    beside(event.target, way)?.focus();
  });
  viewer.addEventListener("keydown", (event) => {
    const way = WAYS[event.key];
    if (!way) return;
    event.preventDefault();
    show(beside(current, way));
  });
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("close", () => current.focus());
  byId("back").addEventListener("click", () => show(beside(current, WAYS.ArrowLeft)));
  byId("on").addEventListener("click", () => show(beside(current, WAYS.ArrowRight)));
}
