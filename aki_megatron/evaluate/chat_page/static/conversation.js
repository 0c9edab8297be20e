// The questions and the answers of every model; what is sent and what is shown of them.

import { PageError, streamAnswer } from "./server.js";

const STATES = {
  length: "cut at the longest answer of this server",
  stopped: "stopped",
};

function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export class Conversation {
  constructor(log) {
    this.log = log;
    this.models = [];
    this.restart();
  }

  restart() {
    this.turns = []; // {question, instruction, history, answers: Map of model id -> text}
    this.stopper = null;
    for (const turn of this.log.querySelectorAll(".turn")) turn.remove();
    this.log.querySelector("#empty").hidden = false;
  }

  get isRunning() {
    return this.stopper !== null;
  }

  stop() {
    this.stopper?.abort();
  }

  /**
   * Messages of a model for the last of the turns. Those before it have the model's own answers; what it failed at is
   * left out. `history` of the last turn: conversation (the picture stands in the first question), again (and in this
   * one), alone (only the picture and this question).
   */
  messages(model, turns, url) {
    const last = turns.at(-1);
    const before = last.history === "alone" ? [] : turns.slice(0, -1).filter((turn) => turn.answers.get(model.id));
    return [...before, last].flatMap((turn, number) => {
      const text = turn.instruction ? `${turn.instruction} ${turn.question}` : turn.question;
      const content = [{ type: "text", text }];
      if (number === 0 || turn.history === "again") {
        // as in AKI's format: the picture, a line break, the question
        content[0].text = `\n${text}`;
        content.unshift({ type: "image_url", image_url: { url } });
      }
      const asked = { role: "user", content };
      return turn === last ? [asked] : [asked, { role: "assistant", content: turn.answers.get(model.id) }];
    });
  }

  /** Ask all models at once. Returns the errors that occurred, each once. */
  async ask(question, url, { instruction, history, reference }) {
    const turn = { question, instruction, history, answers: new Map() };
    this.turns.push(turn);
    const turns = [...this.turns];
    this.log.querySelector("#empty").hidden = true;
    const article = make("article", "turn");
    article.append(make("p", "question", question));
    const pair = make("div", "pair");
    article.append(pair);
    const stopper = new AbortController();
    const { signal } = stopper;
    this.stopper = stopper;
    const errors = new Set();
    const running = this.models.map((model, number) => {
      const card = this.#card(model, number);
      pair.append(card.box);
      return this.#fill(card, model, this.messages(model, turns, url), turn, signal, errors);
    });
    this.log.append(article);
    article.scrollIntoView({ block: "nearest" });
    await Promise.all(running);
    if (reference) article.append(make("p", "reference", `The scene says: ${reference}`));
    if (this.stopper === stopper) this.stopper = null; // no later conversation's
    return [...errors];
  }

  #card(model, number) {
    const box = make("section", number === 0 ? "answer" : "answer second");
    box.setAttribute("aria-label", `Answer of ${model.id}, attention rule ${model.rule}`);
    box.setAttribute("aria-busy", "true");
    const text = make("p", "text", ""), state = make("span", "state", "");
    const by = make("p", "by");
    by.append(make("span", "rule", model.rule), make("span", "name", model.id), state);
    box.append(text, by);
    return { box, text, state };
  }

  async #fill({ box, text, state }, model, messages, turn, signal, errors) {
    try {
      const reason = await streamAnswer(model.id, messages, {
        signal,
        onText: (piece) => {
          text.textContent += piece;
        },
      });
      state.textContent = STATES[reason] ?? "";
      if (!text.textContent.trim()) state.textContent = "the model gave an empty answer";
    } catch (error) {
      if (error.name === "AbortError") {
        state.textContent = STATES.stopped;
      } else {
        if (!(error instanceof PageError)) console.error(error);
        const message = error instanceof PageError ? error.message : `The page failed: ${error.message}`;
        errors.add(message);
        box.append(make("p", "trouble", "No complete answer."));
      }
    }
    turn.answers.set(model.id, text.textContent);
    box.setAttribute("aria-busy", "false");
  }
}
