"""The style sheet and the script of the page, as text that goes into the single file of the report."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --ink: #1b1d21; --soft: #5c616a; --line: #e3e3df; --grid: #ececea;
  --c1: #2563c9; --c2: #d9580d; --c3: #15805a; --c4: #7a3fb3; --c5: #a87a00; --c6: #8a9099;
  --warn: #9a4b00; --good: #15805a; --bad: #b3261e; --code: #f4f4f2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131518; --card: #1b1e22; --ink: #e6e7e9; --soft: #a0a6b0; --line: #30343a; --grid: #2a2e33;
    --c1: #6ea8ff; --c2: #ff9a5c; --c3: #4cc38a; --c4: #c093f2; --c5: #e0b63f; --c6: #868d97;
    --warn: #ffb86b; --good: #4cc38a; --bad: #ff8a80; --code: #16181b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 2px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; letter-spacing: -0.005em; }
h3 { font-size: 14.5px; margin: 0; font-weight: 600; }
p { margin: 0 0 8px; }
.when, .unit, .reading, .small { color: var(--soft); }
.when { font-size: 13.5px; margin-bottom: 18px; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 18px 20px; }
.words p { max-width: 96ch; }
.words p:last-child { margin-bottom: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 14px; margin: 14px 0; }
.figures .card { padding: 12px 16px; }
.figures b { display: block; font-size: 23px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures b { white-space: nowrap; }
@media (max-width: 480px) { .figures b { font-size: 19px; } }
.figures .label { font-size: 13px; color: var(--soft); }
.figures .small, .small { font-size: 12.5px; }
.notes { margin: 14px 0 0; padding: 12px 18px 12px 36px; border-radius: 8px; }
.notes { border: 1px solid var(--line); background: var(--card); color: var(--soft); font-size: 13.5px; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
@media (max-width: 960px) { .charts { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; padding: 14px 16px 12px; display: flex; flex-direction: column; }
figure.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 18px; margin-bottom: 6px; }
.unit { font-weight: 400; font-size: 13px; margin-left: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0; padding: 0; list-style: none; font-size: 13px; }
.legend i { display: inline-block; margin-right: 6px; vertical-align: middle; }
.legend .bar { width: 14px; height: 3px; border-radius: 2px; }
.legend .block { width: 10px; height: 10px; border-radius: 2px; opacity: 0.8; }
.legend .dot, td .dot { display: inline-block; width: 8px; height: 8px; border-radius: 50%; }
.reading { font-size: 13px; line-height: 1.45; margin: 6px 0 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
svg .grid { stroke: var(--grid); }
svg .tick { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .thin { stroke-width: 1; opacity: 0.4; }
svg .band { opacity: 0.16; }
svg .area { opacity: 0.8; stroke: var(--card); stroke-width: 0.5; }
svg .error { stroke-width: 1.5; fill: none; }
svg .point { stroke: var(--card); stroke-width: 1.5; }
svg .mark { stroke: var(--soft); stroke-dasharray: 3 3; }
svg .cursor { stroke: var(--soft); stroke-width: 1; visibility: hidden; pointer-events: none; }
.narrow { display: none; }
@media (max-width: 760px) { .broad { display: none; } .narrow { display: block; } svg .tick { font-size: 16px; } }
.s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); } .s6 { stroke: var(--c6); }
.f1 { fill: var(--c1); } .f2 { fill: var(--c2); } .f3 { fill: var(--c3); }
.f4 { fill: var(--c4); } .f5 { fill: var(--c5); } .f6 { fill: var(--c6); }
.b1 { background: var(--c1); } .b2 { background: var(--c2); } .b3 { background: var(--c3); }
.b4 { background: var(--c4); } .b5 { background: var(--c5); } .b6 { background: var(--c6); }
#tip {
  position: fixed; z-index: 2; visibility: hidden; pointer-events: none; padding: 7px 10px; font-size: 12.5px;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px; box-shadow: 0 2px 10px rgb(0 0 0 / 0.18);
  font-variant-numeric: tabular-nums; white-space: pre;
}
#tip i { display: inline-block; width: 8px; height: 8px; border-radius: 50%; margin-right: 6px; }
.scroll { overflow-x: auto; }
.level { display: inline-block; padding: 1px 9px; border-radius: 5px; font-size: 13px; letter-spacing: 0.02em; }
.level.OK { color: var(--good); background: color-mix(in srgb, var(--good) 13%, transparent); }
.level.WATCH { color: var(--warn); background: color-mix(in srgb, var(--warn) 15%, transparent); }
.level.BAD { color: var(--bad); background: color-mix(in srgb, var(--bad) 14%, transparent); }
.verdict { margin-top: 26px; } .verdict > p { margin: 0; font-size: 16px; }
.verdict > p .level { font-size: 18px; font-weight: 700; margin-right: 8px; }
.verdict .scroll { margin-top: 10px; }
.alerts th:nth-child(1) { width: 110px; } .alerts th:nth-child(2) { width: 190px; }
@media (max-width: 760px) {
  .alerts thead { display: none; }
  .alerts tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .alerts tr:last-child { border-bottom: 0; }
  .alerts td { display: block; padding: 2px 0; border: 0; }
}
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 18px; margin: 0 0 10px; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin: 0 0 12px; font-size: 13.5px; }
.controls select, .controls button {
  font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 3px 8px;
}
.controls button:disabled { opacity: 0.45; }
main > .small { margin-top: 14px; }
#responses .card { margin-bottom: 10px; padding: 12px 16px; }
#responses .prompt { border-left: 3px solid var(--line); padding-left: 10px; margin-bottom: 10px; }
#responses .answers { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px 20px; }
@media (max-width: 760px) { #responses .answers { grid-template-columns: minmax(0, 1fr); } }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: 13.5px; }
th { text-align: left; font-weight: 600; color: var(--soft); padding: 6px 10px; border-bottom: 1px solid var(--line); }
td { vertical-align: top; padding: 9px 10px; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
.text {
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
}
.columns { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 10px; font-size: 12.5px; }
.columns div { display: flex; gap: 6px; min-width: 0; }
.columns dt { color: var(--soft); } .columns dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.columns dd { font-weight: 600; }
.score { font-size: 12.5px; color: var(--soft); margin: 0 0 3px; font-variant-numeric: tabular-nums; }
.score b { color: var(--ink); } .score b.up { color: var(--good); } .score b.down { color: var(--bad); }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin-bottom: 8px; }
summary { padding: 9px 16px; cursor: pointer; font-weight: 600; font-size: 14px; }
summary .small { font-weight: 400; }
details > div, details > pre { padding: 4px 16px 14px; margin: 0; }
details pre { overflow-x: auto; white-space: pre; }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
@media print { body { background: none; } figure, .card, details { break-inside: avoid; } }
"""

# Shows values under the pointer, and the responses. Text is set only by textContent, so it is never read as markup.
SCRIPT = """
"use strict";
const tip = document.getElementById("tip");
const show = (n) => (n === null || n === undefined ? "?" : String(n));
for (const svg of document.querySelectorAll("svg[data-series]")) {
  const series = JSON.parse(svg.dataset.series).filter((s) => s.x.length);
  const cursor = svg.querySelector(".cursor");
  const hide = () => { tip.style.visibility = cursor.style.visibility = "hidden"; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = (xs) => {
      let low = 0, high = xs.length - 1;
      while (low < high) { const mid = (low + high) >> 1; if (xs[mid] < at) low = mid + 1; else high = mid; }
      return low > 0 && at - xs[low - 1] < xs[low] - at ? low - 1 : low;
    };
    if (!series.length) return;
    const found = series.map((s) => ({ s, i: nearest(s.x) }));
    const close = found.reduce((a, b) => (Math.abs(b.s.x[b.i] - at) < Math.abs(a.s.x[a.i] - at) ? b : a));
    tip.replaceChildren(document.createTextNode("step " + close.s.step[close.i]));
    for (const { s, i } of found) {
      const dot = document.createElement("i");
      dot.className = "b" + s.colour;
      const other = s.step[i] === close.s.step[close.i] ? "" : " (step " + s.step[i] + ")";
      const half = s.half ? " \\u00b1 " + show(s.half[i]) : "";
      const text = s.name + "  " + show(s.y[i]) + half + other;
      tip.append(document.createTextNode("\\n"), dot, document.createTextNode(text));
    }
    const x = close.s.x[close.i];
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = tip.style.visibility = "visible";
    const left = box.left + (x / svg.viewBox.baseVal.width) * box.width;
    tip.style.left = (left + 14 + tip.offsetWidth > innerWidth ? left - 14 - tip.offsetWidth : left + 14) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
}

const store = document.getElementById("rows");
if (store) {
  const steps = JSON.parse(store.dataset.rows), by = (id) => document.getElementById(id);
  const atStep = by("at-step"), atGroup = by("at-group"), which = by("which");
  const earlier = by("earlier"), later = by("later");
  const add = (parent, tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  const option = (select, value, text) => { add(select, "option", "", text).value = value; };
  steps.forEach((s, i) => option(atStep, i, s.step));
  const chosen = (rows) => {
    const scored = rows.filter((r) => r[0] !== null);
    const ends = scored.length ? [scored[0], scored[scored.length - 1]] : [];
    return {
      all: rows, best: ends.slice(0, 1), worst: ends.slice(1), ends: scored.length > 1 ? ends : ends.slice(1),
      unscored: rows.filter((r) => r[0] === null),
    }[which.value] || rows.filter((r) => r[2] === which.value);
  };
  const draw = () => {
    const step = steps[atStep.value], place = by("responses");
    place.replaceChildren();
    let count = 0;
    for (const group of step.groups) {
      if (atGroup.value !== "" && atGroup.value !== group.group) continue;
      const rows = chosen(group.rows);
      if (!rows.length && atGroup.value === "") continue;
      const card = add(place, "div", "card");
      add(card, "p", "score", "group " + group.group + " \\u00b7 " + group.of + " responses");
      add(card, "div", "prompt text", group.prompt);
      if (group.columns.length) {
        const list = add(card, "dl", "columns");
        for (const [name, value] of group.columns) {
          const item = add(list, "div");
          add(item, "dt", "", name);
          add(item, "dd", "", value);
        }
      }
      const answers = add(card, "div", "answers");
      const differ = which.value === "ends" && rows.length > 1 && rows[0][0] !== rows[1][0];
      for (const [i, [reward, tokens, , text, parts, ending]] of rows.entries()) {
        const cell = add(answers, "div"), score = add(cell, "p", "score");
        if (differ) add(score, "span", "", i ? "worst " : "best ");
        add(score, "b", "", reward === null ? "no score" : String(reward));
        const facts = [parts, tokens === null ? "" : tokens + " tokens", ending].filter((f) => f);
        add(score, "span", "", " " + facts.join(" \\u00b7 "));
        add(cell, "p", "text", text);
        count += 1;
      }
    }
    const left = step.of - step.groups.length;
    by("shown").textContent = count + " shown" + (left ? ", " + left + " more groups in completions.jsonl" : "");
    earlier.disabled = atStep.selectedIndex === 0;
    later.disabled = atStep.selectedIndex === steps.length - 1;
  };
  const groups = () => {
    const kept = atGroup.value;
    atGroup.replaceChildren();
    option(atGroup, "", "all");
    for (const g of steps[atStep.value].groups) option(atGroup, g.group, g.group);
    atGroup.value = [...atGroup.options].some((o) => o.value === kept) ? kept : "";
    draw();
  };
  const move = (places) => { atStep.selectedIndex += places; groups(); };
  atStep.addEventListener("change", groups);
  atGroup.addEventListener("change", draw);
  which.addEventListener("change", draw);
  earlier.addEventListener("click", () => move(-1));
  later.addEventListener("click", () => move(1));
  atStep.selectedIndex = steps.length - 1;
  groups();
}
"""
