"use strict";

// A rollout as a card: facts, prompt, completion. Long texts open on demand, so that a page stays small.

const FIRST_TOKENS = 400;
const FIRST_CHARACTERS = 3000;

function completionOf(rollout) {
  return rollout.completion ?? rollout.tokens.join("");
}

function card(rollout, { withPrompt, onGroup }) {
  const place = withPrompt ? `step ${rollout.step} · group ${rollout.group} · row ${rollout.row}` : `row ${rollout.row}`;
  const parts = [facts(rollout, place, onGroup)];
  if (withPrompt) parts.push(promptOf(rollout));
  parts.push(rollout.tokens ? tokens(rollout) : longText(rollout.completion, "completion"));
  return make("article", { className: `card ${rollout.kind}` }, parts);
}

function facts(rollout, place, onGroup) {
  const entries = [
    ["reward", number(rollout.reward), "strong"],
    ["advantage", number(rollout.advantage)],
  ];
  const names = Object.keys(rollout.parts);
  if (names.length > 1) names.forEach((name) => entries.push([name, number(rollout.parts[name])]));
  if (rollout.tokens) {
    const drawn = sum(rollout.drawn);
    entries.push(["expert tokens", `${drawn} of ${rollout.tokens.length}`], ["mean w", number(mean(rollout.w))]);
  }
  if (rollout.kind === "injected") {
    if (rollout.source !== undefined) entries.push(["source", visible(String(rollout.source))]);
    entries.push(["selector", visible(String(rollout.selector ?? "–"))], ["score", number(rollout.score)]);
  }
  const head = [
    make("span", { className: `kind ${rollout.kind}`, text: KIND_NAMES[rollout.kind] ?? rollout.kind }),
    make("span", { className: "place", text: place }),
  ];
  if (onGroup) {
    const button = make("button", { type: "button", className: "link", text: "Compare its group" });
    button.addEventListener("click", () => onGroup(rollout));
    head.push(button);
  }
  const list = entries.map(([name, value, className = ""]) =>
    make("div", { className }, [make("dt", { text: visible(name) }), make("dd", { text: value })]));
  return make("div", { className: "facts" }, [make("div", { className: "head" }, head), make("dl", {}, list)]);
}

function promptOf(rollout) {
  return make("div", { className: "prompt" }, [
    make("span", { className: "label", text: "Prompt" }),
    longText(DATA.prompts[rollout.prompt], "text"),
  ]);
}

function longText(text, className) {
  const element = make("div", { className, dir: "auto", text: visible(text.slice(0, FIRST_CHARACTERS)) });
  if (text.length === 0) element.append(make("em", { text: "empty" }));
  if (text.length <= FIRST_CHARACTERS) return element;
  const show = () => { element.textContent = visible(text); };
  return make("div", {}, [element, moreButton(`Show all ${text.length.toLocaleString("en")} characters`, show)]);
}

function moreButton(text, show) {
  const button = make("button", { type: "button", className: "link", text });
  button.addEventListener("click", () => { show(); button.remove(); });
  return button;
}

// One tab stop for all tokens of a rollout; arrow keys move among them.
function tokens(rollout) {
  const box = make("div", { className: "completion tokens", role: "group", dir: "auto",
    "aria-label": "Completion, token by token; arrow keys move" });
  const add = (from, to) => {
    for (let i = from; i < Math.min(to, rollout.tokens.length); i++) box.append(token(rollout, i));
  };
  add(0, FIRST_TOKENS);
  box.firstChild.tabIndex = 0;
  box.rollout = rollout;
  if (rollout.tokens.length <= FIRST_TOKENS) return box;
  const label = `Show all ${rollout.tokens.length.toLocaleString("en")} tokens`;
  return make("div", {}, [box, moreButton(label, () => add(FIRST_TOKENS, rollout.tokens.length))]);
}

function token(rollout, index) {
  const text = rollout.tokens[index];
  const element = make("span", { className: "token", text: visible(text), tabindex: -1, "aria-describedby": "tip" });
  element.style.setProperty("--w", rollout.w[index]);
  if (rollout.drawn[index]) element.classList.add("drawn");
  if (text === "") element.classList.add("partial");
  if (text.includes("\n")) element.classList.add("newline");
  element.dataset.index = index;
  return element;
}

// ---- What a token's record says --------------------------------------------------------------------------------------------------------

function tokenFacts(rollout, index) {
  const drawer = rollout.drawn[index] ? "the expert" : "the policy";
  const threshold = rollout.threshold ? ` (threshold ${number(rollout.threshold)})` : "";
  return [
    ["token", `${index + 1} of ${rollout.tokens.length}`],
    ["drawn by", drawer],
    ["weight w", number(rollout.w[index], 3)],
    ["entropy H", `${number(rollout.h[index], 3)} nats${threshold}`],
    ["acceptance", number(rollout.a[index], 3)],
  ];
}

function showTip(element) {
  const tip = document.getElementById("tip");
  const index = Number(element.dataset.index);
  const rollout = element.parentElement.rollout;
  const text = rollout.tokens[index] === "" ? "part of a character" : JSON.stringify(visible(rollout.tokens[index].slice(0, 80)));
  tip.replaceChildren(
    make("strong", { text }),
    make("dl", {}, tokenFacts(rollout, index).map(([name, value]) =>
      make("div", {}, [make("dt", { text: name }), make("dd", { text: value })]))),
  );
  tip.hidden = false;
  const place = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, place.left), document.documentElement.clientWidth - size.width - 8);
  const below = place.bottom + size.height + 12 < window.innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, below ? place.bottom + 6 : place.top - size.height - 6)}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}

function watchTokens(list) {
  const within = (event) => event.target.closest?.(".tokens > .token");
  list.addEventListener("mouseover", (event) => within(event) && showTip(within(event)));
  list.addEventListener("mouseout", (event) => within(event) && hideTip());
  list.addEventListener("focusin", (event) => within(event) && showTip(within(event)));
  list.addEventListener("focusout", hideTip);
  window.addEventListener("scroll", () => {
    const element = document.activeElement;
    if (element.matches(".tokens > .token")) showTip(element);
    else hideTip();
  }, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  list.addEventListener("keydown", (event) => {
    const element = within(event);
    const next = element && {
      ArrowRight: element.nextElementSibling,
      ArrowLeft: element.previousElementSibling,
      Home: element.parentElement.firstElementChild,
      End: element.parentElement.lastElementChild,
    }[event.key];
    if (!next) return;
    event.preventDefault();
    element.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
