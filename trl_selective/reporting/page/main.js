"use strict";

// State is what the form says, and the page number. Every change filters, sorts and shows one page.

const DATA = JSON.parse(document.getElementById("data").textContent);
const ROLLOUTS_PER_PAGE = 20;
const byId = (id) => document.getElementById(id);
let page = 0;
let found = [];

function groupKey(rollout) {
  return `${rollout.step}/${rollout.group}`;
}

function groupBy(values, keyOf) {
  const groups = new Map();
  for (const value of values) {
    const key = keyOf(value);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(value);
  }
  return groups;
}

// What guidance did comes first in each group.
const KIND_ORDER = ["guided", "injected", "on_policy"];
DATA.rollouts.sort((a, b) => a.step - b.step || a.group - b.group
  || KIND_ORDER.indexOf(a.kind) - KIND_ORDER.indexOf(b.kind) || a.row - b.row);
const GROUPS = groupBy(DATA.rollouts, groupKey);

// ---- Filter and sort -------------------------------------------------------------------------------------------------------------------

function bound(id, otherwise) {
  const value = byId(id).valueAsNumber;
  return Number.isNaN(value) ? otherwise : value;
}

function matcher() {
  const kinds = new Set([...document.querySelectorAll("#kinds input:checked")].map((box) => box.value));
  const query = byId("query").value.trim().toLowerCase();
  const prompts = DATA.prompts.map((prompt) => !query || prompt.toLowerCase().includes(query));
  const [first, last] = [bound("step-from", -Infinity), bound("step-to", Infinity)];
  const [low, high] = [bound("reward-from", -Infinity), bound("reward-to", Infinity)];
  const anyReward = low === -Infinity && high === Infinity;
  return (rollout) =>
    kinds.has(rollout.kind) && rollout.step >= first && rollout.step <= last &&
    (anyReward || (rollout.reward !== undefined && rollout.reward >= low && rollout.reward <= high)) &&
    (prompts[rollout.prompt] || completionOf(rollout).toLowerCase().includes(query));
}

const drawnShare = (rollout) => (rollout.drawn ? sum(rollout.drawn) / rollout.drawn.length : -1);
const isHelped = (rollout) => GROUPS.get(groupKey(rollout))[0].kind !== "on_policy";
const ORDERS = {
  guidance: (rollout) => (isHelped(rollout) ? -rollout.step : 1 / (1 + rollout.step)), // groups without any come last
  newest: (rollout) => -rollout.step,
  oldest: (rollout) => rollout.step,
  "reward-high": (rollout) => -(rollout.reward ?? -Infinity),
  "reward-low": (rollout) => rollout.reward ?? Infinity,
  advantage: (rollout) => -Math.abs(rollout.advantage ?? 0),
  drawn: (rollout) => -drawnShare(rollout),
  score: (rollout) => -(rollout.score ?? -Infinity),
  long: (rollout) => -completionOf(rollout).length,
};

function sorted(rollouts) {
  const valueOf = ORDERS[byId("sort").value];
  const pairs = rollouts.map((rollout) => [valueOf(rollout), rollout]);
  return pairs.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0)).map(([, rollout]) => rollout);
}

// ---- Show ------------------------------------------------------------------------------------------------------------------------------

function isGrouped() {
  return document.querySelector("input[name=view]:checked").value === "groups";
}

function update() {
  found = sorted(DATA.rollouts.filter(matcher()));
  show(0);
}

function show(wanted) {
  const units = isGrouped() ? [...groupBy(found, groupKey).keys()] : found;
  const size = isGrouped() ? 1 : ROLLOUTS_PER_PAGE;
  const pages = Math.max(1, Math.ceil(units.length / size));
  page = Math.min(Math.max(0, wanted), pages - 1);
  const shown = units.slice(page * size, (page + 1) * size);
  hideTip();
  byId("list").replaceChildren(...(isGrouped() ? shown.map(groupView) : shown.map(listCard)));
  if (!shown.length) byId("list").append(make("p", { className: "nothing", text: "No rollout matches these filters." }));
  const of = `${found.length.toLocaleString("en")} of ${DATA.rollouts.length.toLocaleString("en")} rollouts`;
  byId("count").textContent = isGrouped() ? `${of}, in ${units.length.toLocaleString("en")} groups` : of;
  byId("page").textContent = `${isGrouped() ? "Group" : "Page"} ${page + 1} of ${pages}`;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page === pages - 1;
  byId("pages").hidden = pages === 1;
}

function listCard(rollout) {
  return card(rollout, { withPrompt: true, onGroup: openGroup });
}

function openGroup(rollout) {
  document.querySelector("input[name=view][value=groups]").checked = true;
  const keys = [...groupBy(found, groupKey).keys()];
  show(keys.indexOf(groupKey(rollout)));
  byId("filters").scrollIntoView();
}

// All rollouts of one prompt at one step, also those that the filters leave out: what guidance found beside what the policy found alone.
function groupView(key) {
  const rollouts = GROUPS.get(key);
  const own = rollouts.filter((rollout) => rollout.kind === "on_policy");
  const helped = rollouts.filter((rollout) => rollout.kind !== "on_policy");
  const column = (title, members) => make("section", {}, [
    make("h3", { text: `${title} (${members.length}), mean reward ${number(mean(members.map((r) => r.reward)))}` }),
    ...members.map((rollout) => card(rollout, { withPrompt: false })),
  ]);
  const { step, group, coef, threshold } = rollouts[0];
  const settings = [`alpha ${number(coef)}`, ...(threshold ? [`entropy threshold ${number(threshold)} nats`] : [])];
  return make("section", { className: "group" }, [
    make("h2", { text: `Step ${step}, group ${group}` }),
    make("p", { className: "place", text: settings.join(" · ") }),
    promptOf(rollouts[0]),
    make("div", { className: "columns" }, [
      ...(own.length ? [column("On-policy", own)] : []),
      ...(helped.length ? [column("With the expert", helped)] : []),
    ]),
  ]);
}

// ---- Header ----------------------------------------------------------------------------------------------------------------------------

function tile(name, value, detail, className = "") {
  return make("div", { className }, [make("dt", { text: name }), make("dd", { text: value }), make("dd", { className: "detail", text: detail })]);
}

function summarize() {
  const steps = [...new Set(DATA.rollouts.map((rollout) => rollout.step))].sort((a, b) => a - b);
  const range = steps.length > 1 ? `${steps[0]} to ${steps.at(-1)}` : `${steps[0]}`;
  const recorded = DATA.numRecordedSteps ?? steps.length;
  const shown = recorded > steps.length ? `${steps.length} of ${recorded} recorded` : `${steps.length} recorded`;
  const tiles = [
    tile("steps", range, shown),
    tile("rollouts", DATA.rollouts.length.toLocaleString("en"), `${GROUPS.size.toLocaleString("en")} groups`),
  ];
  for (const [kind, name] of Object.entries(KIND_NAMES)) {
    const members = DATA.rollouts.filter((rollout) => rollout.kind === kind);
    if (members.length) {
      const reward = number(mean(members.map((rollout) => rollout.reward)));
      tiles.push(tile(`reward, ${name}`, reward, `mean of ${members.length.toLocaleString("en")}`, kind));
    }
  }
  const guided = DATA.rollouts.filter((rollout) => rollout.tokens);
  if (guided.length) {
    const share = sum(guided.map((rollout) => sum(rollout.drawn))) / sum(guided.map((rollout) => rollout.tokens.length));
    tiles.push(tile("expert drew", percent(share), "of guided tokens"));
  }
  byId("summary").replaceChildren(...tiles);
  byId("title").textContent = visible(DATA.title);
  byId("subtitle").textContent = "Rollouts with selective expert guidance";
  document.title = `${visible(DATA.title)}: guidance viewer`;
  const chart = rewardChart(DATA.rollouts);
  byId("chart").hidden = !chart;
  if (chart) byId("chart").append(make("figcaption", { text: "Mean reward" }), chart);
}

// ---- Start -----------------------------------------------------------------------------------------------------------------------------

let waiting;
byId("filters").addEventListener("input", (event) => {
  clearTimeout(waiting);
  if (event.target.type === "radio") show(0);
  else waiting = setTimeout(update, 120);
});
byId("filters").addEventListener("reset", () => { waiting = setTimeout(update, 0); });
byId("filters").addEventListener("submit", (event) => event.preventDefault());
const turn = (by) => { show(page + by); byId("filters").scrollIntoView(); };
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
byId("more").open = window.matchMedia("(min-width: 60rem)").matches;
for (const kind of document.querySelectorAll("#kinds label")) {
  kind.hidden = !DATA.rollouts.some((rollout) => rollout.kind === kind.firstElementChild.value);
}
watchTokens(byId("list"));
summarize();
update();
