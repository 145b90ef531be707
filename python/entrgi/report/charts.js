"use strict";
// Small SVG charts without a library. Colours come from the page's CSS variables, so both themes work.

const SVG = "http://www.w3.org/2000/svg";

function svgNode(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// Round ticks that cover [low, high]: steps of 1, 2 or 5 times a power of ten.
function niceTicks(low, high, count) {
  const span = Math.max(high - low, 1e-9);
  const rough = span / count, power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const ticks = [];
  for (let i = Math.floor(low / step); i <= Math.ceil(high / step); i++) ticks.push(+(i * step).toFixed(10));
  return ticks;
}

function fixed(value, digits = 2) {
  return !Number.isFinite(value) ? "–" : value.toFixed(digits).replace("-", "−");
}

function signed(value) {
  return !Number.isFinite(value) ? "–" : (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(2);
}

// series: [{label, color, values, before, after, final, now}], one value of each list per step; `now` instead of `final`
// while it runs. Returns {place(step)}.
function rewardCurve(host, series, steps, onPick) {
  const width = Math.max(280, host.clientWidth), height = width < 520 ? 170 : 200;
  const room = { left: 34, right: width < 520 ? 86 : 100, top: 10, bottom: 24 };
  const values = series.flatMap((s) => [...s.values, ...s.before, ...s.after, s.final]).filter((v) => v !== null && v !== undefined);
  const ticks = niceTicks(Math.min(...values, 0), Math.max(...values, 1), 4);
  const low = ticks[0], high = ticks[ticks.length - 1];
  const x = (step) => room.left + (step / Math.max(1, steps)) * (width - room.left - room.right);
  const y = (v) => room.top + (1 - (v - low) / (high - low)) * (height - room.top - room.bottom);
  const said = series.map((s) => `${s.label}: final reward ${fixed(s.final)}`).join("; ");
  const svg = svgNode("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "Reward over denoising steps. " + said });
  for (const tick of ticks) {
    svgNode("line", { class: "axis", x1: room.left, x2: x(steps), y1: y(tick), y2: y(tick) }, svg);
    svgNode("text", { x: room.left - 8, y: y(tick) + 4, "text-anchor": "end" }, svg, String(tick).replace("-", "−"));
  }
  for (const step of niceTicks(0, steps, width < 520 ? 4 : 8)) {
    if (step <= steps && Number.isInteger(step)) svgNode("text", { x: x(step), y: height - 6, "text-anchor": "middle" }, svg, step);
  }
  svgNode("text", { x: x(steps) + 16, y: height - 6 }, svg, "step");
  const cursor = svgNode("line", { class: "cursor", y1: room.top - 4, y2: height - room.bottom + 2 }, svg);
  const dots = [];
  for (const s of series) {
    const points = s.values.map((v, i) => [i + 1, v]).filter((p) => p[1] !== null);
    s.after.forEach((v, i) => {
      const b = s.before[i];
      if (v === null || b === null || v === b) return;
      // One stroke per step: what guidance added within it.
      svgNode("line", { x1: x(i + 1), x2: x(i + 1), y1: y(b), y2: y(v), stroke: s.color, "stroke-width": 3, opacity: 0.28 }, svg);
    });
    if (points.length) {
      const path = points.map((p, i) => (i ? "L" : "M") + x(p[0]).toFixed(1) + " " + y(p[1]).toFixed(1)).join("");
      svgNode("path", { d: path, fill: "none", stroke: s.color, "stroke-width": 2.2, "stroke-linejoin": "round" }, svg);
      dots.push([svgNode("circle", { r: 4.5, fill: s.color }, svg), s]);
    }
  }
  // Final rewards at the right edge, pushed apart where they would overlap.
  const ends = series.map((s) => ({ s, value: s.final ?? s.now })).filter((e) => e.value !== null)
    .map((e) => ({ ...e, at: y(e.value), text: y(e.value) })).sort((a, b) => a.at - b.at);
  for (let i = 1; i < ends.length; i++) ends[i].text = Math.max(ends[i].text, ends[i - 1].text + 30);
  for (const end of ends) {
    if (end.s.final !== null) svgNode("path", { d: `M${x(steps) + 1} ${end.at}l5 -5l5 5l-5 5z`, fill: end.s.color }, svg);
    svgNode("text", { class: "name", x: x(steps) + 16, y: end.text, style: `fill:${end.s.color}` }, svg, end.s.label);
    svgNode("text", { x: x(steps) + 16, y: end.text + 14 }, svg, (end.s.final === null ? "now " : "text ") + fixed(end.value));
  }
  const pick = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) * (width / box.width) - room.left) / (width - room.left - room.right);
    onPick(Math.round(Math.min(1, Math.max(0, at)) * steps));
  };
  svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); pick(event); });
  svg.addEventListener("pointermove", (event) => { if (event.buttons) pick(event); });
  host.replaceChildren(svg);
  return {
    place(step) {
      cursor.setAttribute("x1", x(step));
      cursor.setAttribute("x2", x(step));
      for (const [dot, s] of dots) {
        const value = step ? s.values[Math.min(step, s.values.length) - 1] : null;
        dot.style.display = value === null || value === undefined ? "none" : "";
        if (value !== null && value !== undefined) { dot.setAttribute("cx", x(Math.min(step, s.values.length))); dot.setAttribute("cy", y(value)); }
      }
    },
  };
}

// rows: [{label, color, mean, error}] on one axis: a dot and one standard error to both sides.
function dotPlot(host, rows, label) {
  const width = Math.max(240, host.clientWidth), line = 26, bottom = 20, height = rows.length * line + bottom;
  const left = 92, right = 46;
  const ends = rows.flatMap((r) => [r.mean - (r.error || 0), r.mean + (r.error || 0)]);
  const ticks = niceTicks(Math.min(...ends, 0), Math.max(...ends, 0), 4);
  const low = ticks[0], high = ticks[ticks.length - 1];
  const x = (v) => left + ((v - low) / (high - low)) * (width - left - right);
  const said = rows.map((r) => `${r.label} ${fixed(r.mean)}` + (r.error === null ? "" : ` plus or minus ${fixed(r.error)}`)).join("; ");
  const svg = svgNode("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${label}: ${said}` });
  for (const tick of ticks) {
    svgNode("line", { class: "axis", x1: x(tick), x2: x(tick), y1: 2, y2: height - bottom }, svg);
    svgNode("text", { x: x(tick), y: height - 5, "text-anchor": "middle" }, svg, String(tick).replace("-", "−"));
  }
  rows.forEach((row, i) => {
    const y = i * line + line / 2 + 1;
    svgNode("text", { x: 0, y: y + 4, style: "fill:var(--ink)" }, svg, row.label);
    if (row.error !== null) {
      const a = x(row.mean - row.error), b = x(row.mean + row.error);
      svgNode("path", { d: `M${a} ${y}H${b}M${a} ${y - 4}v8M${b} ${y - 4}v8`, stroke: row.color, "stroke-width": 1.8, fill: "none" }, svg);
    }
    svgNode("circle", { cx: x(row.mean), cy: y, r: 5, fill: row.color }, svg);
    svgNode("text", { x: width, y: y + 4, "text-anchor": "end", style: "fill:var(--ink)" }, svg, fixed(row.mean));
  });
  host.replaceChildren(svg);
}
