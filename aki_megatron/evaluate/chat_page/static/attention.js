// What the picture's tokens attended to: bars over the words of the question, heat over the picture.

import { drawHeat, clearHeat, rampGradient } from "./heat.js";

const element = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
const sum = (values) => values.reduce((total, value) => total + value, 0);

/** Where the largest of the values [height * width] is, in words. */
function whereIsMost(values, { height, width }) {
  const most = values.indexOf(Math.max(...values));
  const third = (position, size) => Math.min(2, Math.floor((3 * (position + 0.5)) / size));
  const row = third(Math.floor(most / width), height), column = third(most % width, width);
  const rows = ["top", "middle", "bottom"], columns = ["left", "", "right"];
  if (row === 1 && column === 1) return "in the middle";
  return `at the ${[rows[row], columns[column]].filter(Boolean).join(" ")}`;
}

export class AttentionView {
  constructor() {
    this.found = null; // an answer of /inspect
    this.chosen = -1; // number of a word; -1: all
    this.list = element("words");
    this.list.addEventListener("keydown", (event) => this.#onKey(event));
    this.list.addEventListener("click", (event) => {
      const word = event.target.closest(".word");
      if (word) this.choose(Number(word.dataset.number));
    });
    element("heat-kind").addEventListener("change", () => this.#draw());
    element("opacity").addEventListener("input", () => this.#draw());
    element("ramp").style.background = rampGradient();
  }

  /** Show nothing: there is no answer, or it belongs to another picture. */
  clear() {
    this.found = null;
    element("attention").hidden = true;
    clearHeat(element("heat"), "No heat yet: ask a question");
  }

  /** Show a text instead of bars: they are being computed, or cannot be. */
  note(text, { isBusy = false } = {}) {
    this.found = null;
    element("attention").hidden = false;
    element("attention").setAttribute("aria-busy", String(isBusy));
    element("attention-note").textContent = text;
    element("attention-body").hidden = true;
    clearHeat(element("heat"), "No heat");
  }

  /** Show an answer of /inspect; words of the instruction before the last question stand back. */
  show(found, instruction) {
    this.found = found;
    this.chosen = -1;
    this.total = sum(found.words.map((word) => word.mass));
    element("attention").hidden = false;
    element("attention").setAttribute("aria-busy", "false");
    element("attention-body").hidden = false;
    element("attention-note").textContent = this.#explanation();
    const most = Math.max(...found.words.map((word) => word.mass), 1e-9);
    this.list.classList.toggle("none", this.total === 0);
    this.list.replaceChildren(
      this.#option(-1, "All words", percent(this.total)),
      ...found.words.map((word, number) => this.#option(number, word.text, percent(word.mass), word.mass / most)),
    );
    found.words.forEach((word, number) => {
      // the prompt is a line break, the instruction, a space and the question
      element(`word-${number}`).classList.toggle("given", found.is_last && word.start <= instruction.length);
    });
    this.choose(-1);
  }

  #explanation() {
    const { words, rule, turn, is_last: isLast, num_turns: turns } = this.found;
    const parts = [];
    if (!isLast) {
      parts.push(
        `The picture stands in question ${turn} of ${turns}, and its tokens see the words of that question only. Ask ` +
          "with the picture again to let them see the next one.",
      );
    }
    if (words.some((word) => word.is_later) && this.total === 0) {
      parts.push(
        `Under ${rule} the picture's tokens see nothing of the text after them: every bar is 0. The heat shows where ` +
          "they look in any case.",
      );
    } else {
      parts.push(
        "The bars are shares of the attention of the picture's tokens; what is missing to 100 % goes to the picture " +
          "itself and to the rest of the prompt.",
      );
    }
    return parts.join(" ");
  }

  #option(number, text, value, size = null) {
    const option = document.createElement("div");
    option.className = number < 0 ? "word all" : "word";
    option.id = `word-${number}`;
    option.dataset.number = number;
    option.setAttribute("role", "option");
    option.setAttribute("aria-label", `${text}: ${value}`);
    if (size !== null) {
      const bar = document.createElement("span"), inner = document.createElement("i");
      bar.className = "bar";
      inner.style.setProperty("--size", size);
      bar.append(inner);
      option.append(bar);
    }
    for (const [name, content] of [["name", text], ["value", value]]) {
      const part = document.createElement("span");
      part.className = name;
      part.textContent = content;
      option.append(part);
    }
    return option;
  }

  choose(number) {
    this.chosen = number;
    for (const option of this.list.children) {
      option.setAttribute("aria-selected", String(Number(option.dataset.number) === number));
    }
    this.list.setAttribute("aria-activedescendant", `word-${number}`);
    this.#draw();
  }

  #onKey(event) {
    if (this.found === null) return;
    const last = this.found.words.length - 1;
    const next = {
      ArrowRight: Math.min(last, this.chosen + 1),
      ArrowDown: Math.min(last, this.chosen + 1),
      ArrowLeft: Math.max(-1, this.chosen - 1),
      ArrowUp: Math.max(-1, this.chosen - 1),
      Home: -1,
      End: last,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    this.choose(next);
    element(`word-${next}`).scrollIntoView({ block: "nearest" });
  }

  /** Shares of the patches: of the attention to the chosen words, or of all tokens where there is none. */
  #shares() {
    const { heat, base } = this.found;
    const mass = this.chosen < 0 ? this.total : this.found.words[this.chosen].mass;
    if (mass === 0) return base;
    if (this.chosen >= 0) return heat[this.chosen].map((value) => value / mass);
    return base.map((_, patch) => sum(heat.map((one) => one[patch])) / mass);
  }

  #draw() {
    if (this.found === null) return;
    const { base, grid, words } = this.found;
    const shares = this.#shares();
    const isExcess = element("heat-kind").value === "excess";
    const values = isExcess ? shares.map((value, patch) => Math.max(0, value - base[patch])) : shares;
    const most = Math.max(...values), least = Math.min(...values);
    const name = this.chosen < 0 ? "the words" : `"${words[this.chosen].text}"`;
    const mass = this.chosen < 0 ? this.total : words[this.chosen].mass;
    const it = this.chosen < 0 ? "them" : "it";
    const excess = isExcess ? "more than the others " : "";
    const text = mass === 0
      ? `No attention goes to ${name}. All tokens look most ${whereIsMost(base, grid)}.`
      : most < 1e-4
        ? `The tokens that attend to ${name} look where all tokens look.`
        : `${percent(mass)} goes to ${name}; the tokens that attend to ${it} look ${excess}most ${whereIsMost(values, grid)}.`;
    element("heat-text").textContent = text;
    const per = isExcess ? "more" : "of their attention";
    element("scale-start").textContent = percent(least);
    element("scale-end").textContent = `${percent(most)} ${per} in a patch`;
    drawHeat(element("heat"), values, grid, { least, most, opacity: element("opacity").value / 100, label: `Heat: ${text}` });
  }
}
