"use strict";
// The drawing of a page, for one comparison after another: report.show(data), and report.append(step) to one that runs.
const report = (() => {
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  // Light paper to plum; in the dark the same road the other way, so that more entropy always stands out more.
  const RAMPS = {
    light: ["#fbf1de", "#f9cf96", "#f29a63", "#dd5f6d", "#a93680", "#6a1f7d", "#3b1256"],
    dark: ["#2a2233", "#54265f", "#8b2f72", "#c4446b", "#ea7a5c", "#f8b878", "#fdeec2"],
  };
  const state = { prompt: 0, sample: "best", step: 0, sides: [], playing: false, speed: 1 };
  let data = null, panels = [], frames = 1, curve = null, timer = 0, drawPlots = () => {};
  // A comparison that still runs names its mask token; its panels show the newest step.
  const running = () => data.mask !== undefined;

  // Everything enters the document through here: text nodes, never markup.
  function el(name, properties = {}, ...children) {
    const node = document.createElement(name);
    for (const key in properties) {
      if (key === "style" || key.startsWith("aria-") || key === "role" || key === "scope") node.setAttribute(key, properties[key]);
      else node[key] = properties[key];
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }
  const methodOf = (key) => data.methods.find((m) => m.key === key);
  const color = (key) => methodOf(key).color;
  const swatch = (key) => el("span", { className: "swatch", style: `--method:${color(key)}` });

  // ---- theme -------------------------------------------------------------------------------------------------
  const stored = { get(k) { try { return localStorage.getItem(k); } catch { return null; } }, set(k, v) { try { localStorage.setItem(k, v); } catch { /* private window */ } } };
  let ramp = RAMPS.light;
  function setTheme(theme) {
    root.dataset.theme = theme;
    ramp = RAMPS[theme];
    $("ramp").style.background = `linear-gradient(90deg, ${ramp.join(",")})`;
  }
  function entropyColor(hundredths) {
    const at = Math.min(1, Math.max(0, hundredths / 100 / data.top)) * (ramp.length - 1), i = Math.min(ramp.length - 2, Math.floor(at));
    const mix = (k) => Math.round(parseInt(ramp[i].slice(k, k + 2), 16) * (1 - at + i) + parseInt(ramp[i + 1].slice(k, k + 2), 16) * (at - i));
    return `rgb(${mix(1)} ${mix(3)} ${mix(5)})`;
  }

  // ---- one panel: a sample being denoised --------------------------------------------------------------------
  function sampleIndex(method, prompt) {
    const samples = data.samples[method][prompt];
    if (running()) return 0;
    return state.sample === "best" ? samples.findIndex((s) => s.best) : Math.min(Number(state.sample), samples.length - 1);
  }
  // Numbers of the masked slots, or one for all, by slot; null where it was not masked.
  function spread(row, masked) {
    let next = 0;
    return masked.map((yes) => (yes ? (Array.isArray(row) ? row[next++] ?? 0 : row) : null));
  }
  // Entropies and weights when each step began (hundredths), by slot.
  function unfold(trace) {
    if (trace.levels) return;
    const masked = trace.h.map((_, index) => trace.at.map((at) => at === -1 || at >= index));
    trace.levels = trace.h.map((row, index) => spread(row, masked[index]));
    trace.weights = masked.map((slots, index) => spread(Array.isArray(trace.w) ? trace.w[index] : trace.w, slots));
  }
  function buildPanel(side) {
    const host = document.querySelector(`.panel[data-side="${side}"]`), method = state.sides[side];
    const index = sampleIndex(method, state.prompt), sample = data.samples[method][state.prompt][index] ?? {};
    const trace = data.traces[method][state.prompt][index];
    const pick = el("select", { "aria-label": side ? "Method on the right" : "Method on the left" },
      ...data.methods.map((m) => el("option", { value: m.key, textContent: m.label, selected: m.key === method })));
    pick.addEventListener("change", () => { state.sides[side] = pick.value; rebuild(); focusPick(side); });
    const score = el("span", { className: "score" }), facts = el("div", { className: "facts" });
    const canvas = el("div", { className: "canvas" });
    host.style.setProperty("--method", color(method));
    host.replaceChildren(el("header", {}, pick, score), canvas, facts);
    if (!trace) {
      canvas.append(el("div", { className: "empty", textContent: "This sample was not recorded. Its text:" }), sample.text);
      score.replaceChildren("reward", el("b", { textContent: fixed(sample.reward) }));
      return { method, sample, trace: null };
    }
    unfold(trace);
    const nodes = trace.tokens.map(() => el("i")), gaps = trace.tokens.map(() => new Text());
    canvas.append(...nodes.flatMap((node, slot) => [gaps[slot], node]));
    const panel = { method, sample, trace, nodes, gaps, score, facts };
    write(panel);
    return panel;
  }
  // The panel's tokens, as its trace has them.
  function write({ trace, nodes, gaps }) {
    const stop = trace.tokens.indexOf(data.eos);
    trace.tokens.forEach((token, slot) => {
      const raw = data.strings[token] ?? "�", fill = token === data.eos, open = token === data.mask;
      const after = slot && (fill || open || /^\s/.test(raw));
      gaps[slot].data = !after ? "" : fill || raw[0] !== "\n" ? " " : "\n";
      nodes[slot].textContent = fill ? (slot === stop ? "∎" : "·") : raw.trim() || (raw.includes("\n") ? "⏎" : "␣");
      nodes[slot].className = "tok" + (fill ? " fill" : "") + (fill && slot > stop ? " after" : "") + (open ? " open" : "");
    });
  }
  function focusPick(side) { document.querySelector(`.panel[data-side="${side}"] select`).focus(); }

  function drawPanel(panel) {
    const { trace, nodes, sample } = panel;
    if (!trace) return;
    const done = Math.min(state.step, trace.h.length), now = Math.min(done, trace.h.length - 1);
    let left = 0, sum = 0;
    nodes.forEach((node, slot) => {
      const at = trace.at[slot], masked = at === -1 || at >= done;
      const level = trace.levels[masked ? now : at]?.[slot] ?? 0;
      if (masked) { left += 1; sum += level; }
      node.classList.toggle("masked", masked);
      node.classList.toggle("fresh", !masked && at === done - 1);
      node.style.setProperty("--h", entropyColor(level));
      if (masked) node.setAttribute("aria-hidden", "true"); else node.removeAttribute("aria-hidden");
      const weight = trace.weights[masked ? now : at]?.[slot] ?? 0;
      node.title = `slot ${slot + 1}: entropy ${(level / 100).toFixed(2)} nats` + (panel.method === "none" ? "" : `, weight ${(weight / 100).toFixed(2)}`)
        + (masked ? ", masked" : `, committed in step ${at + 1}`);
    });
    const finished = !running() && done >= trace.h.length, before = done ? trace.before[done - 1] : null, after = done ? trace.after[done - 1] : null;
    panel.score.replaceChildren(finished ? "reward of the text" : "reward", el("b", { textContent: fixed(finished ? sample.reward : done ? trace.reward[done - 1] : null) }));
    const facts = [left ? `${left} masked` + (trace.h.length ? `, ${(sum / left / 100).toFixed(2)} nats on average` : "") : "all committed"];
    if (running()) facts.unshift(done ? `step ${done} of ${frames}` : "waiting");
    if (before !== null && after !== null && panel.method !== "none") facts.push(`guidance ${signed(after - before)}`);
    panel.facts.replaceChildren(...facts.map((text) => el("span", { textContent: text })));
  }

  // ---- replay ------------------------------------------------------------------------------------------------
  function rebuild() {
    panels = [0, 1].map(buildPanel);
    frames = running() ? data.steps : Math.max(1, ...panels.map((p) => (p.trace ? p.trace.h.length : 0)));
    $("question").textContent = data.prompts[state.prompt];
    $("prompt").value = String(state.prompt);
    $("previous").disabled = state.prompt === 0;
    $("next").disabled = state.prompt === data.prompts.length - 1;
    $("slider").max = String(frames);
    state.step = running() ? frames : Math.min(state.step, frames);
    drawCurve();
    draw();
  }
  function drawCurve() {
    const shown = panels.filter((p, i) => p.trace && (i === 0 || p.method !== panels[0].method));
    curve = rewardCurve($("curve"), shown.map((p) => ({
      label: methodOf(p.method).label, color: color(p.method), values: p.trace.reward, before: p.trace.before, after: p.trace.after, final: p.sample.reward ?? null,
      now: running() ? p.trace.reward[p.trace.reward.length - 1] ?? null : null,
    })), frames, (step) => { pause(); go(step); });
    const lifted = shown.some((p) => p.trace.before.some((b) => b !== null));
    $("curve-note").textContent = "masks filled with the likeliest tokens" + (lifted ? "; bars: what guidance added within a step" : "") + (running() ? "" : "; ◆ the finished text");
  }
  function draw(smoothly = false) {
    document.querySelector(".panels").classList.toggle("live", smoothly);
    panels.forEach(drawPanel);
    if (curve) curve.place(state.step);
    const said = `step ${state.step} of ${frames}`;
    $("slider").value = String(state.step);
    $("slider").setAttribute("aria-valuetext", said);
    $("position").textContent = innerWidth < 760 ? `${state.step} / ${frames}` : said;
    $("first").disabled = $("back").disabled = state.step === 0;
    $("last").disabled = $("forward").disabled = state.step === frames;
    $("play").textContent = state.playing ? "Pause" : state.step === frames ? "Replay" : "Play";
  }
  function go(step) {
    const near = Math.abs(step - state.step) === 1;
    state.step = Math.min(frames, Math.max(0, step));
    draw(near);
  }
  function pause() { state.playing = false; clearTimeout(timer); }
  function tick() {
    if (!state.playing) return;
    if (state.step >= frames) { pause(); draw(); return; }
    go(state.step + 1);
    // About nine seconds in all at normal speed, whatever the number of steps; the first frames stay a little longer.
    timer = setTimeout(tick, Math.min(650, 9000 / frames) / state.speed);
  }
  function toggle() {
    if (state.playing) { pause(); draw(); return; }
    if (state.step >= frames) state.step = 0;
    state.playing = true;
    draw();
    timer = setTimeout(tick, 350 / state.speed);
  }
  function choose(prompt) {
    pause();
    state.prompt = Math.min(data.prompts.length - 1, Math.max(0, prompt));
    state.step = 0;
    rebuild();
  }

  // One step of one method of the comparison that runs; texts of tokens that were not sent before.
  function append(step, strings) {
    Object.assign(data.strings, strings);
    const trace = data.traces[step.method][0][0], index = trace.h.length;
    const masked = step.tokens.map((token, slot) => token === data.mask || step.committed.includes(slot));
    step.tokens.forEach((token, slot) => { if (token !== data.mask && trace.at[slot] === -1) trace.at[slot] = index; });
    trace.tokens = step.tokens;
    for (const key of ["h", "w", "reward", "before", "after"]) trace[key].push(step[key]);
    trace.levels.push(spread(step.h, masked));
    trace.weights.push(spread(step.w, masked));
    scaleTo(Math.max(data.top, Math.ceil(Math.max(...step.h, 0) / 50) / 2));
    panels.filter((panel) => panel.trace === trace).forEach(write);
    drawCurve();
    draw(true);
  }
  function scaleTo(top) {
    data.top = top;
    $("ramp-top").textContent = `${top} nats`;
  }

  // ---- tables, plots, texts ----------------------------------------------------------------------------------
  function pair(value, sign) {
    const cell = el("td", {}, el("span", { textContent: sign ? signed(value.mean) : fixed(value.mean) }));
    if (value.error !== null) cell.append(" ", el("small", { textContent: "± " + fixed(value.error) }));
    return cell;
  }
  function tables() {
    const metrics = data.metrics, heads = metrics.map((m) => el("th", { scope: "col", textContent: m.label, title: m.about }));
    const best = Object.fromEntries(metrics.map((m) => {
      const means = data.methods.map((x) => x.estimates[m.key].mean).filter((v) => v !== null);
      return [m.key, m.lower ? Math.min(...means) : Math.max(...means)];
    }));
    $("table").replaceChildren(
      el("caption", { textContent: "Mean ± standard error over prompts, the best in bold" }),
      el("thead", {}, el("tr", {}, el("th", { scope: "col", textContent: "Method" }), ...heads, el("th", { scope: "col", textContent: "seconds" }))),
      el("tbody", {}, ...data.methods.map((m) => el("tr", {}, el("th", { scope: "row" }, swatch(m.key), m.label),
        ...metrics.map((metric) => {
          const cell = pair(m.estimates[metric.key], false);
          if (m.estimates[metric.key].mean === best[metric.key]) cell.firstChild.className = "lead-value";
          return cell;
        }), el("td", { textContent: m.seconds.toFixed(1) })))));
    $("differences").replaceChildren();
    if (!data.differences.length) return;
    $("differences").replaceChildren(
      el("caption", { textContent: "Paired differences ± standard error" }),
      el("thead", {}, el("tr", {}, el("th", { scope: "col", textContent: "Difference" }), ...heads.map((h) => h.cloneNode(true)))),
      el("tbody", {}, ...data.differences.map((d) => el("tr", {}, el("th", { scope: "row", textContent: `${d.a} − ${d.b}` }),
        ...metrics.map((metric) => pair(d.values[metric.key], true))))));
  }
  function plots() {
    $("plots").replaceChildren();
    const hosts = data.metrics.map((metric) => {
      const host = el("div");
      $("plots").append(el("div", {}, el("h3", {}, metric.label, el("small", { textContent: metric.lower ? "lower is better" : "" })), host));
      return () => dotPlot(host, data.methods.map((m) => ({ label: m.label, color: color(m.key), ...m.estimates[metric.key] })).filter((r) => r.mean !== null), metric.label);
    });
    return () => hosts.forEach((drawOne) => drawOne());
  }
  function listing() {
    const first = data.methods[0].key, last = data.methods[data.methods.length - 1].key;
    const top = (key, i) => Math.max(...data.samples[key][i].map((s) => s.reward ?? -Infinity));
    $("listing-hint").textContent = `Best reward of each prompt: ${methodOf(first).label} → ${methodOf(last).label}. Inside, a click on a reward replays that sample.`;
    $("listing").replaceChildren();
    $("unfold").textContent = "Open all";
    data.prompts.forEach((prompt, i) => {
      const body = el("div", { className: "columns" });
      const fold = el("details", {}, el("summary", {}, el("span", { className: "q", textContent: prompt }),
        el("span", { className: "gain", textContent: `${fixed(top(first, i))} → ${fixed(top(last, i))}` })), body);
      // Filled when opened: hundreds of texts cost nothing until somebody wants them.
      const fillIn = () => {
        if (body.childElementCount) return;
        for (const m of data.methods) {
          const order = data.samples[m.key][i].map((s, k) => [s, k]).sort((a, b) => (b[0].reward ?? -1e9) - (a[0].reward ?? -1e9));
          body.append(el("div", {}, el("h4", {}, swatch(m.key), m.label), el("ol", {}, ...order.map(([s, k]) => {
            const recorded = data.traces[m.key][i][k];
            const mark = recorded ? el("button", { type: "button", title: "Replay this sample", "aria-label": `Replay, reward ${fixed(s.reward)}`, textContent: fixed(s.reward) })
              : el("span", { className: "plain", textContent: fixed(s.reward) });
            if (recorded) mark.addEventListener("click", () => replay(i, m.key, k));
            return el("li", { className: s.best ? "best" : "" }, mark, el("span", { className: "text", textContent: s.text.trim() || "(empty)" }));
          }))));
        }
      };
      fold.addEventListener("toggle", () => { if (fold.open) fillIn(); });
      $("listing").append(fold);
    });
  }
  function unfoldAll() {
    const folds = [...$("listing").children], open = folds.some((f) => !f.open);
    folds.forEach((f) => { f.open = open; });
    $("unfold").textContent = open ? "Close all" : "Open all";
  }
  function replay(prompt, method, sample) {
    state.sample = String(sample);
    $("sample").value = state.sample;
    state.sides[method === state.sides[0] ? 0 : 1] = method;
    choose(prompt);
    $("replay").scrollIntoView();
    if (!calm.matches) toggle();
  }

  // ---- start -------------------------------------------------------------------------------------------------
  // Everything that depends on the comparison. Where to begin: {prompt, step, sample, method}, all of it optional.
  function show(given, at = {}) {
    pause();
    data = given;
    const keys = data.methods.map((m) => m.key);
    const right = [at.method, "entrgi", keys[keys.length - 1]].find((k) => keys.includes(k));
    state.sides = [keys.includes("none") && right !== "none" ? "none" : keys[0], right];
    state.prompt = Math.min(data.prompts.length - 1, Math.max(0, Number(at.prompt || 1) - 1 || 0));
    state.step = Number(at.step || 0) || 0;
    state.sample = at.sample || "best";
    $("lead").textContent = data.lead;
    $("note").textContent = data.note;
    $("note").hidden = !data.note;
    $("footer").textContent = `${data.footer}; this page loads nothing from the network.`;
    scaleTo(data.top);
    $("prompt").replaceChildren(...data.prompts.map((p, i) => el("option", { value: String(i), textContent: `${i + 1}. ${p.replace(/\s+/g, " ").slice(0, 90)}` })));
    $("sample").replaceChildren(el("option", { value: "best", textContent: "best sample" }),
      ...Array.from({ length: data.samplesPerPrompt }, (_, k) => el("option", { value: String(k), textContent: `sample ${k + 1}` })));
    $("sample").value = state.sample;
    $("metrics").replaceChildren(...data.metrics.flatMap((m) => [el("dt", { textContent: m.label }), el("dd", { textContent: m.about })]));
    $("setting-list").replaceChildren(...data.settings.map(([name, value]) => el("div", {}, el("dt", { textContent: name }), el("dd", { textContent: value }))));
    drawPlots = () => {};
    if (!running()) {
      tables();
      listing();
      drawPlots = plots();
    }
    rebuild();
    drawPlots();
  }
  // What holds for every comparison, once.
  function wire(wanted) {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const theme = wanted || stored.get("entrgi-theme") || (dark ? "dark" : "light");
    setTheme(theme === "dark" ? "dark" : "light");
    const step = (by) => () => { pause(); go(state.step + by); };
    $("theme").addEventListener("click", () => { setTheme(root.dataset.theme === "dark" ? "light" : "dark"); stored.set("entrgi-theme", root.dataset.theme); if (data) draw(); });
    $("play").addEventListener("click", toggle);
    $("back").addEventListener("click", step(-1));
    $("forward").addEventListener("click", step(1));
    $("first").addEventListener("click", step(-1e9));
    $("last").addEventListener("click", step(1e9));
    $("slider").addEventListener("input", () => { pause(); go(Number($("slider").value)); });
    $("speed").addEventListener("change", () => { state.speed = Number($("speed").value); });
    $("prompt").addEventListener("change", () => choose(Number($("prompt").value)));
    $("sample").addEventListener("change", () => { state.sample = $("sample").value; choose(state.prompt); });
    $("previous").addEventListener("click", () => choose(state.prompt - 1));
    $("next").addEventListener("click", () => choose(state.prompt + 1));
    $("unfold").addEventListener("click", unfoldAll);
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.form || !data || running()) return;
      const at = event.target.tagName, arrows = event.key.startsWith("Arrow") || event.key === "Home" || event.key === "End";
      if (at === "SELECT" || (at === "INPUT" && arrows)) return;
      if (event.key === " " && (at === "BUTTON" || at === "SUMMARY" || at === "A")) return;
      const action = {
        " ": toggle, ArrowLeft: step(-1), ArrowRight: step(1), Home: step(-1e9), End: step(1e9),
        "[": () => choose(state.prompt - 1), "]": () => choose(state.prompt + 1),
      }[event.key];
      if (!action) return;
      event.preventDefault();
      action();
    });
    let width = innerWidth;
    addEventListener("resize", () => { if (data && innerWidth !== width) { width = innerWidth; drawCurve(); draw(); drawPlots(); } });
  }
  // A page that brings its comparison along; the address may say where to begin.
  function begin(given) {
    const wish = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    wire(wish.theme);
    show(given, { prompt: wish.prompt, step: wish.step, method: wish.method });
    if (wish.step === undefined && !calm.matches) toggle();
  }
  return { $, el, calm, wire, show, append, unfoldAll, begin };
})();

const given = JSON.parse(document.getElementById("data").textContent);
if (given.samples) report.begin(given);
