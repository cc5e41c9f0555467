"use strict";
// The pages of `label`. A vote shows the next pair at once and is sent behind it; one that is not acknowledged yet is kept
// in this browser, shown as such, and sent again until it is. Nothing here is ever parsed as HTML.

const byId = (id) => document.getElementById(id);
const show = (element, visible) => { element.hidden = !visible; };
const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const wait = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

async function ask(path, body) {
  const headers = { "X-Rater": encodeURIComponent(document.body.dataset.rater) }; // whom this page is drawn for
  const options = body === undefined ? { headers }
    : { method: "POST", body: JSON.stringify(body), headers: { ...headers, "Content-Type": "application/json" } };
  const answer = await fetch(path, options);
  const found = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(found.error), { status: answer.status });
  return found;
}

function say(text) {
  byId("problem").textContent = text;
  show(byId("problem"), text !== "");
}

function welcome(form) {
  for (const control of form.elements) control.disabled = false; // until now, Enter would have sent the form elsewhere
  form.elements.name.focus();
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await ask("/name", { name: form.elements.name.value });
      location.replace("/");
    } catch (error) { say(error.message); }
  });
}

function labelling() {
  const MINE = `vote ${document.body.dataset.study} ${encodeURIComponent(document.body.dataset.rater)} `; // one entry a vote: tabs share the store
  const unsent = Object.keys(localStorage).filter((name) => name.startsWith(MINE)) // of an earlier visit, the server being gone
    .map((name) => JSON.parse(localStorage.getItem(name))).sort((a, b) => a.made - b.made);
  const loaded = new Map(); // images by name: those that are due are there before they are needed
  let upcoming = [];
  let known = 0; // votes that the server has
  let total = 0;
  let drawn = ""; // the question on the page, and since when
  let since = 0;
  let undoing = newKey(); // an undo whose answer is lost is the same undo when u is pressed again
  let sending = false;
  let isStarted = false;

  function preload(task) {
    for (const name of task.images) {
      if (!loaded.has(name)) {
        const image = new Image();
        image.src = `/image/${name}`;
        image.decode().catch(() => {}); // shown as broken where it is shown
        loaded.set(name, image);
      }
    }
  }

  // What is judged is what is seen: an image that is late leaves the one before it on the page until it comes.
  const isThere = () => ["left", "right"].every((side) => byId(side).complete);
  const dim = () => byId("pair").classList.toggle("late", !isThere());

  function draw() {
    const [task] = upcoming;
    const done = known + unsent.length;
    show(byId("pair"), task !== undefined);
    show(byId("actions"), isStarted);
    for (const button of byId("actions").querySelectorAll("button:not(#undo)")) show(button, task !== undefined); // all done
    show(byId("done"), task === undefined && isStarted && unsent.length === 0);
    byId("progress").value = isStarted ? `${done} of ${total}${unsent.length > 1 ? `, ${unsent.length} being saved` : ""}` : "";
    byId("bar").style.setProperty("width", `${total ? (100 * done) / total : 0}%`);
    byId("prompt").textContent = task?.prompt ?? "";
    if (task?.task === drawn) return;
    drawn = task?.task;
    if (task === undefined) return;
    for (const [place, side] of ["left", "right"].entries()) {
      for (const id of [side, `zoom-${side}`]) byId(id).src = `/image/${task.images[place]}`;
    }
    dim();
    byId("prompt").scrollTop = 0;
    since = performance.now();
  }

  function take(state) {
    const pending = new Set(unsent.map((vote) => vote.task));
    const current = upcoming.slice(0, 1); // stays, whatever happened in another tab: it is being looked at
    upcoming = [...current, ...state.tasks.filter(({ task }) => task !== current[0]?.task && !pending.has(task))];
    upcoming.forEach(preload);
    for (const name of loaded.keys()) if (loaded.size > 60) loaded.delete(name);
    known = state.done;
    total = state.total;
    isStarted = true;
  }

  async function send() {
    if (sending) return;
    sending = true;
    let pause = 250;
    let refusal = "";
    while (unsent.length > 0) {
      let state;
      try {
        state = await ask("/vote", unsent[0]);
      } catch (error) {
        if (![400, 404].includes(error.status)) { // nobody there, no room, a new token: again, a little later
          const why = error.status === undefined ? "The server does not answer." : `The vote is not saved: ${error.message}.`;
          say(`${why} Your votes are kept in this browser and sent again.`);
          await wait(pause);
          pause = Math.min(2 * pause, 5000);
          continue;
        }
        refusal = error.message; // it can never be taken
      }
      localStorage.removeItem(MINE + unsent.shift().key);
      if (state) take(state);
      if (pause > 250) say("");
      pause = 250;
      draw();
    }
    sending = false;
    if (refusal) { // another tab is further: what was got ahead may be answered as well
      say(refusal);
      upcoming = [];
    }
    if (upcoming.length === 0) await refill();
    draw();
  }

  async function refill() {
    try { take(await ask("/next")); } catch (error) { say(error.message); }
  }

  function vote(answer, reason = "") {
    const [task] = upcoming;
    if (task === undefined || (answer !== "skip" && !isThere())) return;
    const seconds = (performance.now() - since) / 1000;
    upcoming.shift();
    const key = newKey();
    undoing = newKey();
    unsent.push({ task: task.task, answer, reason, seconds, key, made: Date.now() });
    localStorage.setItem(MINE + key, JSON.stringify(unsent.at(-1)));
    say("");
    draw();
    send();
  }

  async function undo() {
    for (let tries = 0; sending || unsent.length > 0; tries += 1) { // what is on its way arrives first
      if (tries === 100) {
        say("Your last votes are not saved yet; they can be taken back once they are.");
        return;
      }
      await wait(20);
    }
    try {
      const state = await ask("/undo", { key: undoing });
      undoing = newKey();
      upcoming = [state.undone, ...upcoming.filter((task) => task.task !== state.undone.task)];
      take(state);
      say("");
    } catch (error) { say(error.message); }
    draw();
  }

  const zoom = byId("zoom");
  const skip = byId("skip-dialog");
  const help = byId("help");
  const toggle = (dialog) => (dialog.open ? dialog.close() : dialog.showModal());
  const keys = {
    1: () => vote("left"), ArrowLeft: () => vote("left"),
    2: () => vote("right"), ArrowRight: () => vote("right"),
    0: () => vote("tie"), ArrowDown: () => vote("tie"),
    b: () => vote("both_bad"), s: () => upcoming.length && toggle(skip), u: undo,
    " ": () => upcoming.length && toggle(zoom), "?": () => toggle(help),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.matches("input, textarea, select")) return;
    if (skip.open) {
      const button = skip.querySelectorAll("button")[Number(event.key) - 1];
      if (button?.value) { event.preventDefault(); button.click(); }
      return;
    }
    if (help.open && event.key !== "?") return;
    if (zoom.open && event.key === "?") return;
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    if (zoom.open && event.key !== " ") zoom.close();
    act();
  });
  for (const button of document.querySelectorAll("[data-answer]")) {
    button.addEventListener("click", (event) => { if (event.detail < 2) vote(button.dataset.answer); }); // a double click is one vote
  }
  for (const side of ["left", "right"]) {
    byId(side).addEventListener("load", dim);
    byId(side).addEventListener("error", async () => { // a server that is away comes back
      const missing = byId(side).src;
      await wait(1000);
      if (byId(side).src === missing) byId(side).src = missing;
    });
  }
  byId("skip").addEventListener("click", keys.s);
  byId("undo").addEventListener("click", undo);
  byId("zoom-button").addEventListener("click", keys[" "]);
  byId("help-button").addEventListener("click", keys["?"]);
  zoom.addEventListener("click", () => zoom.close());
  skip.addEventListener("close", () => { if (skip.returnValue) vote("skip", skip.returnValue); skip.returnValue = ""; });
  window.addEventListener("beforeunload", (event) => { if (unsent.length > 0) event.preventDefault(); });
  window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); }); // back: what was answered stays so

  (async () => {
    await send();
    while (!isStarted) {
      await refill();
      if (!isStarted) await wait(1000);
    }
    draw();
  })();
}

if (byId("name-form")) welcome(byId("name-form"));
if (byId("pair")) labelling();
