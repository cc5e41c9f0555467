"use strict";
// Choosing by mouse or key, and how often a person agrees with the labels. Nothing here is ever parsed as HTML.

const key = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const form = byId("form");
const cards = [...byId("cards").children];
const WAYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "unsure" };
const Z = 1.959964;
let current = 0;
let revealed = false;

const answerOf = (number) => new FormData(form).get(String(number));
const plural = (amount, word) => `${amount} ${word}${amount === 1 ? "" : "s"}`;
const percent = (share) => `${Math.round(100 * share)} %`;

function wilson(agreed, total) {
  const share = agreed / total;
  const shrink = 1 + Z ** 2 / total;
  const middle = (share + Z ** 2 / (2 * total)) / shrink;
  const half = (Z * Math.sqrt((share * (1 - share)) / total + Z ** 2 / (4 * total ** 2))) / shrink;
  return [middle - half, middle + half];
}

function move(to) {
  cards[current]?.classList.remove("current");
  current = Math.max(0, Math.min(cards.length - 1, to));
  cards[current]?.classList.add("current");
}

function update() {
  const answered = key.filter(({ number }) => answerOf(number)).length;
  byId("progress").value = `${answered} of ${plural(cards.length, "pair")}`;
  byId("bar").style.width = percent(cards.length ? answered / cards.length : 0);
  byId("reveal").disabled = revealed || answered === 0;
}

function reveal() {
  const answers = key.map(({ number, pair_id, chosen }) => ({ number, pair_id, answer: answerOf(number), chosen }));
  const given = answers.filter(({ answer }) => answer);
  const judged = given.filter(({ answer, chosen }) => answer !== "unsure" && chosen);
  const agreed = judged.filter(({ answer, chosen }) => answer === chosen).length;
  const unsure = given.filter(({ answer }) => answer === "unsure").length;
  const [low, high] = judged.length ? wilson(agreed, judged.length) : [0, 1];
  byId("result-title").textContent = judged.length
    ? `You agree with the labels on ${agreed} of ${plural(judged.length, "pair")}: ${percent(agreed / judged.length)}.`
    : "You preferred none, so there is nothing to compare.";
  byId("detail").textContent = [
    judged.length ? `95 % interval ${percent(low)} to ${percent(high)} (Wilson); chance is 50 %.` : "",
    unsure ? `On ${plural(unsure, "pair")} you could not tell.` : "",
    answers.length > given.length ? `${plural(answers.length - given.length, "pair")} left open.` : "",
  ].join(" ").trim();
  byId("answers").value = given.map(({ number, pair_id, answer, chosen }) => JSON.stringify({ number, pair_id, answer, agrees: answer === "unsure" || !chosen ? null : answer === chosen })).join("\n") + "\n";
  byId("download").href = URL.createObjectURL(new Blob([byId("answers").value], { type: "application/jsonl" }));
  answers.forEach(({ answer, chosen }, i) => {
    const truth = cards[i].querySelector(".truth");
    const label = chosen ? `The label says ${chosen}.` : "The label is a tie.";
    truth.textContent = label;
    truth.classList.toggle("against", Boolean(chosen && answer && answer !== "unsure" && answer !== chosen));
    truth.hidden = false;
  });
  for (const input of form.querySelectorAll("input")) input.disabled = true;
  revealed = true;
  byId("reveal").disabled = true;
  byId("result").hidden = false;
  byId("result").focus();
}

form.addEventListener("submit", (event) => { event.preventDefault(); if (!revealed) reveal(); });
form.addEventListener("change", (event) => {
  move(cards.indexOf(event.target.closest("li")));
  update();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.id === "answers") return;
  const answer = WAYS[event.key];
  if (event.key !== "j" && event.key !== "k" && (!answer || revealed)) return;
  event.preventDefault();
  if (answer) {
    [...cards[current].querySelectorAll("input")].find((input) => input.value === answer).checked = true;
    update();
  }
  move(current + (event.key === "k" ? -1 : 1));
  cards[current].scrollIntoView({ block: "start" });
});

move(0);
update();
