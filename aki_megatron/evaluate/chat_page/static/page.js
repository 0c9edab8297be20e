// The page: a picture, a conversation with every model of the server, and what the picture's tokens attended to.

import { AttentionView } from "./attention.js";
import { Conversation } from "./conversation.js";
import { PictureChooser } from "./picture.js";
import { PageError, inspect, loadSetup } from "./server.js";

const element = (id) => document.getElementById(id);

const conversation = new Conversation(element("log"));
const attention = new AttentionView();
const picture = new PictureChooser({ onChange: onPicture, onError: showError });
let setup = null;
let example = null;
let inspecting = null; // AbortController of the request for the attention that is shown

function showError(message) {
  element("error").textContent = message;
}

async function start() {
  try {
    setup = await loadSetup();
  } catch (error) {
    element("about").textContent = "";
    showError(`${error.message} Reload the page afterwards.`);
    return;
  }
  element("about").textContent = setup.about;
  conversation.models = setup.models;
  picture.configure(setup);
  element("history").value = setup.wording.history;
  element("instruction").value = setup.wording.instruction;
  setup.models.forEach((model, number) => {
    const label = document.createElement("label"), input = document.createElement("input");
    label.className = number === 0 ? "choice" : "choice second";
    Object.assign(input, { type: "radio", name: "inspected", value: model.id, checked: model === firstToInspect() });
    input.addEventListener("change", showAttention);
    const rule = document.createElement("span");
    rule.className = "rule";
    rule.textContent = model.rule;
    label.title = model.id;
    label.append(input, rule);
    element("rules").append(label);
  });
  element("rules").hidden = setup.models.length < 2;
}

/** The model whose image tokens see the question, if there is one. */
function firstToInspect() {
  return setup.models.find((model) => model.sees_question) ?? setup.models[0];
}

function onPicture(chosen) {
  example = chosen;
  restart();
  const group = element("suggestions");
  group.replaceChildren(
    ...(chosen?.questions ?? []).map(({ text }) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => {
        element("question").value = text;
        element("question").focus();
      });
      return button;
    }),
  );
  group.hidden = !chosen?.questions.length;
}

function restart() {
  conversation.stop();
  inspecting?.abort();
  conversation.restart();
  attention.clear();
  showError("");
  setRunning(false);
  element("restart").disabled = true;
}

function setRunning(isRunning) {
  element("send").disabled = isRunning;
  element("stop").disabled = !isRunning;
}

async function ask(event) {
  event?.preventDefault();
  const input = element("question"), question = input.value.trim();
  if (setup === null) return showError("The server has not answered yet. Reload the page once it runs.");
  if (conversation.isRunning) return showError("An answer is being written. Press Escape to stop it, or wait.");
  if (picture.url === null) return showError("There is no picture yet. Choose one first: every question is about it.");
  if (!question) return showError("There is no question yet. Type one.");
  showError("");
  input.value = "";
  setRunning(true);
  element("restart").disabled = false;
  attention.note("The attention is shown once the answers are complete.");
  const reference = example?.questions.find((each) => each.text === question)?.answer;
  const turns = conversation.turns;
  const instruction = element("instruction").value.trim(), history = element("history").value;
  const errors = await conversation.ask(question, picture.url, { instruction, history, reference });
  if (turns !== conversation.turns) return; // another conversation has begun meanwhile
  setRunning(false);
  if (errors.length) {
    showError(errors.join(" "));
    input.value ||= question;
  }
  await showAttention();
}

async function showAttention() {
  const id = document.querySelector("input[name=inspected]:checked").value;
  const model = setup.models.find((each) => each.id === id);
  if (conversation.turns.length === 0 || conversation.isRunning) return;
  inspecting?.abort();
  inspecting = new AbortController();
  const { signal } = inspecting;
  attention.note("Computing the attention ...", { isBusy: true });
  try {
    const found = await inspect(model.id, conversation.messages(model, conversation.turns, picture.url), signal);
    if (!signal.aborted) attention.show(found, conversation.turns.at(-1).instruction);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof PageError)) console.error(error);
    attention.note(`The attention cannot be shown. ${error.message}`);
  }
}

element("ask").addEventListener("submit", ask);
element("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (conversation.isRunning) conversation.stop();
  else if (element("attention").contains(document.activeElement) && attention.found) attention.choose(-1);
});
element("stop").addEventListener("click", () => conversation.stop());
element("restart").addEventListener("click", () => {
  restart();
  element("question").focus();
});
start();
