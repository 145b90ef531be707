// The page of `entrgi serve`: a form, a stream of steps, and the report's drawing (report.show, report.append).
(() => {
  const { $, el } = report, about = given;
  const LEAD = "Type a prompt and watch a diffusion language model answer it twice from the same random numbers: "
    + "left alone, and steered at every denoising step by a reward model.";
  // name: [what it is called, lowest, highest where the server sets no limit, step, what it does]
  const SLIDERS = {
    max_new_tokens: ["Length", 1, 128, 1, "L: tokens of the response, all masked at first"],
    steps: ["Steps", 1, 128, 1, "T, of denoising: the fewer, the more tokens each commits"],
    num_samples: ["Samples", 1, 8, 1, "K: drawn with each method; the first is shown live"],
    guidance_steps: ["Guidance steps", 0, 8, 1, "M: gradient steps within a denoising step; 0 guides nothing"],
    learning_rate: ["Learning rate", 0, 2, 0.05, "η: how far a gradient step moves a logit"],
    guidance_scale: ["Guidance scale", 0, 10, 0.1, "γ, for first-order guidance: logits a unit of reward"],
    temperature: ["Temperature", 0, 2, 0.05, "τ: 0 takes the likeliest token"],
    top_p: ["Top-p", 0.05, 1, 0.05, "Draws from the likeliest tokens of this mass; 1 draws from all"],
  };
  const run = document.documentElement.dataset;
  let control = null, last = null;

  // ---- form --------------------------------------------------------------------------------------------------
  const options = (pairs) => pairs.map(([value, textContent]) => el("option", { value, textContent }));
  const inputs = {};
  for (const [name, [label, min, most, step, title]] of Object.entries(SLIDERS)) {
    if (!(name in about.defaults)) continue;
    const usual = about.defaults[name] ?? 1, max = about.limits[name] ?? Math.max(most, usual), shown = el("output");
    // In this order: a range forces its value between its ends when it is set.
    inputs[name] = el("input", { type: "range", min, max, step, value: usual });
    inputs[name].addEventListener("input", () => { shown.value = inputs[name].value; });
    $("seed-field").before(el("label", { title }, el("span", { className: "field" }, label, shown), inputs[name]));
  }
  $("reward").append(...options(about.rewards.map((name) => [name, name])));
  $("left").append(...options(Object.entries(about.methods)));
  $("right").append(...options(Object.entries(about.methods)));
  $("examples").append(...about.examples.map((text) => {
    const button = el("button", { type: "button", className: "quiet", textContent: text, title: text });
    button.addEventListener("click", () => { $("ask").value = text; keepLink(); });
    return button;
  }));
  $("key-field").hidden = !about.key;
  const session = { get() { try { return sessionStorage.getItem("entrgi-key") || ""; } catch { return ""; } }, set(v) { try { sessionStorage.setItem("entrgi-key", v); } catch { /* private window */ } } };

  // What a link holds; the key is no part of it.
  function settings() {
    return { ...Object.fromEntries(Object.entries(inputs).map(([name, input]) => [name, Number(input.value)])), seed: Number($("seed").value) };
  }
  function keepLink() {
    refresh();
    const all = { prompt: $("ask").value, reward: $("reward").value, left: $("left").value, right: $("right").value, ...settings() };
    history.replaceState(null, "", "#" + new URLSearchParams(all));
  }
  function fillIn(wish) {
    const choose = (id, wanted) => { if ([...$(id).options].some((o) => o.value === wanted)) $(id).value = wanted; };
    $("ask").value = wish.get("prompt") ?? "";
    choose("reward", wish.get("reward"));
    choose("left", wish.get("left"));
    choose("right", wish.get("right"));
    for (const name in inputs) if (Number.isFinite(parseFloat(wish.get(name)))) inputs[name].value = wish.get(name);
    $("seed").value = wish.get("seed") ?? about.defaults.seed ?? 0;
    refresh();
  }
  function refresh() {
    for (const name in inputs) inputs[name].dispatchEvent(new Event("input"));
    for (const [id, other] of [["left", "right"], ["right", "left"]]) {
      for (const option of $(id).options) option.disabled = option.value === $(other).value;
    }
    if (inputs.guidance_scale) inputs.guidance_scale.parentNode.hidden = ![$("left").value, $("right").value].includes("first_order");
  }

  // ---- a run -------------------------------------------------------------------------------------------------
  const stop = el("button", { type: "button", textContent: "Stop" }), bar = el("progress", { "aria-label": "Progress" });
  const outcome = el("p", { id: "outcome" });
  function phase(name, said) {
    run.run = name;
    $("said").textContent = said;
    $("run").textContent = control ? "Stop" : "Run";
    $("replay-title").textContent = name === "running" ? "Live" : "Replay";
    $("save").disabled = name !== "done";
  }
  function complain(text) {
    $("error").textContent = text;
    $("error").hidden = !text;
    if (text) $("error").scrollIntoView({ block: "nearest" });
  }
  const keyed = () => (about.key ? { Authorization: `Bearer ${$("key").value}` } : {});
  // The server's answer, or an Error that says what a person can do about it.
  async function ask(path, request) {
    const answer = await fetch(path, request).catch((error) => { throw error.name === "AbortError" ? error : new Error("The server does not answer."); });
    if (answer.ok) return answer;
    const said = await answer.json().catch(() => ({})), wait = answer.headers.get("Retry-After");
    throw new Error((said.error?.message ?? `The server answered ${answer.status}.`) + (wait ? ` Try again in ${wait} s.` : ""));
  }
  async function* messages(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
  function show(data, at) {
    report.show(data, { ...at, method: data.methods[1].key });
    dress();
  }
  function dress() {
    $("lead").textContent = LEAD;
    $("note").textContent = about.note;
    $("note").hidden = !about.note;
    $("footer").textContent = `entrgi serve: ${about.model}`;
  }
  async function compare() {
    const methods = [$("left").value, $("right").value];
    keepLink();
    complain("");
    session.set($("key").value);
    control = new AbortController();
    phase(run.run, "Waiting for the server …");
    try {
      const answer = await ask("compare", {
        method: "POST", signal: control.signal, headers: { "Content-Type": "application/json", ...keyed() },
        body: JSON.stringify({ prompt: $("ask").value, reward: $("reward").value, methods, settings: settings() }),
      });
      await follow(answer, methods, control.signal);
      control = null;
      phase("done", "Done.");
    } catch (error) {
      const stopped = error.name === "AbortError";
      control = null;
      phase(run.run === "running" ? "stopped" : run.run, stopped ? "Stopped." : "");
      if (!stopped) complain(error.message);
    }
    if (document.activeElement === stop) $("run").focus();  // which goes
  }
  async function follow(answer, methods, signal) {
    let rest = 0, before = 0, finished = false;
    for await (const message of messages(answer)) {
      signal.throwIfAborted();
      if (message.error) throw new Error(message.error.message);
      if (message.start) {
        // Steps that come faster than an eye reads stay a moment each: two seconds a method at most.
        rest = Math.min(120, 2000 / message.start.steps);
        for (const trace of Object.values(message.start.traces)) Object.assign(trace[0][0], { levels: [], weights: [] });
        phase("running", "");
        show(message.start);
        bar.max = 2 * message.start.steps;
        bar.value = 0;
        outcome.textContent = `Sample 1 of ${message.start.samplesPerPrompt} of each method, as it is denoised`;
        if (innerWidth < 760) document.querySelector(".panels").scrollIntoView(); else $("replay").scrollIntoView({ block: "nearest" });
      } else if (message.step) {
        const place = methods.indexOf(message.step.method), early = before + rest - performance.now();
        if (early > 0 && !report.calm.matches && !document.hidden) await new Promise((then) => setTimeout(then, early));
        before = performance.now();
        signal.throwIfAborted();
        if ($("said").dataset.method !== message.step.method) $("said").textContent = `${about.methods[methods[place]]} runs …`;
        $("said").dataset.method = message.step.method;
        bar.value = place * bar.max / 2 + message.step.step + 1;
        report.append(message.step, message.strings);
      } else if (message.report) {
        last = JSON.stringify(message.report);  // before the drawing adds what it works out
        finished = true;
        run.run = "done";  // what is hidden has no width
        show(message.report, { step: 1e9, sample: "0" });
        report.unfoldAll();
        conclude(message.report);
      }
    }
    if (!finished) throw new Error("The server broke off.");
  }
  // The two methods in one line each.
  function conclude(data) {
    outcome.replaceChildren(...data.methods.map((method) => {
      const rewards = data.samples[method.key][0].map((s) => s.reward).filter((reward) => reward !== null);
      const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
      return el("span", { style: `--method:${method.color}` }, el("b", { textContent: method.label }),
        ` best of ${rewards.length} `, el("b", { textContent: fixed(Math.max(...rewards)) }), `, mean ${fixed(mean)}`);
    }));
  }
  async function save() {
    try {
      const page = await (await ask("report.html", { headers: keyed() })).text();
      // As `embed` of entrgi.report: nothing in it can end the element.
      const safe = last.replace(/[<>&\u2028\u2029]/g, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
      const whole = page.replace(/(<script type="application\/json" id="data">)[^<]*/, (_, head) => head + safe);
      const href = URL.createObjectURL(new Blob([whole], { type: "text/html" }));
      el("a", { href, download: "entrgi-report.html" }).click();
      setTimeout(() => URL.revokeObjectURL(href), 60000);
    } catch (error) {
      complain(error.message);
    }
  }

  // ---- start -------------------------------------------------------------------------------------------------
  run.run = "none";
  report.wire();
  dress();
  $("question").after(outcome);
  document.querySelector(".controls").after(el("div", { className: "controls meter" }, stop, bar));
  $("left").value = "none";
  $("right").value = "entrgi";
  fillIn(new URLSearchParams(location.hash.slice(1)));
  $("key").value = session.get();
  addEventListener("hashchange", () => { if (location.hash.includes("=")) fillIn(new URLSearchParams(location.hash.slice(1))); });
  $("form").addEventListener("change", keepLink);
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (control) control.abort(); else compare();
  });
  if (/Mac|iP/.test(navigator.platform)) $("enter").firstChild.textContent = "⌘";
  $("ask").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || control) return;
    event.preventDefault();
    $("form").requestSubmit();
  });
  stop.addEventListener("click", () => control.abort());
  $("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 1e6); keepLink(); });
  $("save").addEventListener("click", save);
  $("link").addEventListener("click", async () => {
    keepLink();
    const copied = navigator.clipboard && await navigator.clipboard.writeText(location.href).then(() => true, () => false);
    $("said").textContent = copied ? "Copied." : "The link is in the address bar.";
  });
  // The address is the permalink's: ways within the page leave it alone.
  document.addEventListener("click", (event) => {
    const to = event.target.closest("a[href^='#']") && $(event.target.getAttribute("href").slice(1));
    if (!to) return;
    event.preventDefault();
    to.tabIndex = -1;
    to.focus({ preventScroll: true });
    to.scrollIntoView();
  });
})();
