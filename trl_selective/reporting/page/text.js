"use strict";

// Makes elements and texts. Data becomes text nodes and nothing else.

const KIND_NAMES = { on_policy: "on-policy", guided: "guided", injected: "injected" };

function make(tag, { className, text, ...attributes } = {}, children = []) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Control characters and halves of characters by name: they would be invisible, or turn around the text that follows.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\p{Cs}]/gu, (character) => {
    const code = character.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

function number(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  const rounded = Number.isInteger(value) ? String(value) : value.toFixed(digits);
  return (Number(rounded) === 0 && value !== 0 ? value.toPrecision(1) : rounded).replace("-", "−");
}

function percent(value) {
  return `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
}

function mean(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}
