"use strict";

// Mean reward over steps, one line per kind of rollout.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 480;
const HEIGHT = 132;
const EDGE = { left: 40, right: 70, top: 10, bottom: 22 };

function draw(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function rewardChart(rollouts) {
  const steps = [...new Set(rollouts.map((rollout) => rollout.step))].sort((a, b) => a - b);
  const curves = Object.keys(KIND_NAMES).map((kind) => [kind, curve(rollouts.filter((r) => r.kind === kind))])
    .filter(([, points]) => points.length);
  const means = curves.flatMap(([, points]) => points.map(([, value]) => value));
  if (steps.length < 2 || !means.length) return null;
  const low = Math.min(0, ...means);
  const high = Math.max(...means) > low ? Math.max(...means) : low + 1;
  const span = steps.at(-1) - steps[0];
  const x = (step) => EDGE.left + ((WIDTH - EDGE.left - EDGE.right) * (step - steps[0])) / span;
  const y = (value) => EDGE.top + ((HEIGHT - EDGE.top - EDGE.bottom) * (high - value)) / (high - low);

  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "Mean reward over steps, by kind of rollout" });
  for (const value of [low, high]) {
    svg.append(draw("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  svg.append(draw("text", { x: x(steps[0]), y: HEIGHT - 5 }, `step ${steps[0]}`));
  svg.append(draw("text", { x: x(steps.at(-1)), y: HEIGHT - 5, "text-anchor": "end" }, steps.at(-1)));
  const ends = labelPlaces(curves.map(([, points]) => y(points.at(-1)[1])));
  curves.forEach(([kind, points], i) => {
    const path = points.map(([step, value], j) => `${j ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    svg.append(draw("path", { class: `line ${kind}`, d: path }));
    const [step, value] = points.at(-1);
    svg.append(draw("circle", { class: `dot ${kind}`, cx: x(step), cy: y(value), r: 3 }));
    svg.append(draw("text", { class: `name ${kind}`, x: WIDTH - EDGE.right + 8, y: ends[i] + 4 }, KIND_NAMES[kind]));
  });
  return svg;
}

function curve(rollouts) {
  return [...groupBy(rollouts, (rollout) => rollout.step)].map(([step, members]) => [step, mean(members.map((rollout) => rollout.reward))])
    .filter(([, value]) => value !== null).sort((a, b) => a[0] - b[0]);
}

// Heights of labels that do not overlap.
function labelPlaces(heights) {
  const order = heights.map((_, i) => i).sort((a, b) => heights[a] - heights[b]);
  const places = [...heights];
  order.slice(1).forEach((i, k) => { places[i] = Math.max(places[i], places[order[k]] + 14); });
  const excess = Math.max(0, places[order.at(-1)] - (HEIGHT - EDGE.bottom));
  return places.map((place) => place - excess);
}
