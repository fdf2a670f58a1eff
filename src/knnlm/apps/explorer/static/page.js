"use strict";
// The page: gets an analysis from the server, or its own file; colors the tokens, follows the sliders.

(() => {
  const at = (id) => document.getElementById(id);
  let analysis = null;
  let settings = [];
  let mixed = null;
  let tokens = []; // the elements
  let selected = -1;
  let opened = new Map();
  let groups;
  let credited = null; // [store, document] whose tokens are outlined
  let key = "";
  let asking = null; // aborts the request that is under way
  let arranged = 0;
  const changed = new Set(); // stores whose sliders were moved

  // ---- the server ----

  function say(message, isWrong = false) {
    at("status").textContent = message;
    at("status").classList.toggle("wrong", isWrong);
  }

  function headers() {
    const own = { "Content-Type": "application/json" };
    if (key) own.Authorization = `Bearer ${key}`;
    return own;
  }

  /** Return what to say of a refusal that the page can help with; it then shows how. */
  function refused(status) {
    if (status !== 401) return null;
    at("key-field").hidden = false;
    return "this server needs an API key: enter it above";
  }

  async function ask(path, body, signal) {
    const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
    const answer = await fetch(path, { ...options, headers: headers(), signal });
    if (answer.ok) return answer.json();
    const { error } = await answer.json().catch(() => ({ error: { message: answer.statusText } }));
    throw new Error(refused(answer.status) ?? error.message);
  }

  /** Run one piece of work at a time: an earlier one is aborted. */
  async function during(message, work) {
    asking?.abort();
    const own = new AbortController();
    asking = own;
    say(message);
    try {
      await work(own.signal);
    } catch (error) {
      if (error.name !== "AbortError") say(`It failed: ${error.message}`, true);
    }
  }

  async function explain(text, generated = []) {
    await during("Reading…", async (signal) => {
      const started = performance.now();
      const plain = await ask("/explorer/analysis", { text, generated }, signal);
      show(Mixture.read(plain));
      const seconds = ((performance.now() - started) / 1000).toFixed(1);
      say(`${analysis.count.toLocaleString("en")} tokens in ${seconds} s. Choose one to see its neighbors.`);
    });
  }

  async function write(text, length) {
    let generated = null;
    await during("Writing…", async (signal) => {
      const body = { prompt: text, max_tokens: length, temperature: 0, sources: 1 };
      if (changed.size) {
        body.k = settings.map((one) => one.k);
        body.lmbda = settings.map((one) => one.lmbda);
        body.knn_temperature = settings.map((one) => one.temperature);
      }
      const answer = await ask("/v1/completions", body, signal);
      generated = answer.choices[0].sources.map((one) => one.token);
      if (!generated.length) say("The model ends the text here.");
    });
    if (generated?.length) await explain(text, generated);
  }

  async function fetchPassages(missing) {
    const rows = analysis.stores.map((_, which) => [
      ...new Set(missing.filter((one) => one.which === which).map((one) => one.row)),
    ]);
    const numbering = analysis.stores.map((store) => store.numbering);
    const asked = analysis;
    try {
      const answers = await ask("/explorer/passages", { rows, numbering });
      answers.forEach((answer, which) => {
        const { passages } = asked.stores[which];
        rows[which].forEach((row) => passages.set(String(row), answer[row] ?? null));
      });
      if (asked === analysis) showToken();
    } catch (error) {
      say(`Passages: ${error.message}`, true);
    }
  }

  // ---- an analysis ----

  function show(read) {
    const same = analysis && read.stores.length === analysis.stores.length;
    const before = settings;
    analysis = read;
    const kept = (which) => same && changed.has(which);
    settings = analysis.stores.map((store, which) =>
      kept(which)
        ? { ...before[which], k: Math.min(before[which].k, store.k) }
        : { ...store.parameters, k: Math.min(store.parameters.k, store.k) },
    );
    selected = -1;
    credited = null;
    at("result").hidden = !isStandalone() && at("ask").hidden; // the other tab is open
    const model = analysis.model.startsWith("/") ? analysis.model.split("/").pop() : analysis.model;
    at("subtitle").textContent = `${model} · ${analysis.stores
      .map((store) => `${store.path} (${store.entries.toLocaleString("en")} entries)`)
      .join(" · ")}`;
    at("sliders").replaceChildren(Sliders.make(analysis.stores, settings, changed, later));
    showTokens();
    update();
    const isWritten = analysis.generatedFrom < analysis.count;
    at("written-legend").hidden = !isWritten;
    // the first token's neighbors are only the beginnings of documents
    let best = isWritten ? analysis.generatedFrom : Math.min(1, analysis.count - 1);
    for (let token = best; token < analysis.count; token += 1) {
      if (gain(token) > gain(best)) best = token;
    }
    select(best, false);
  }

  function gain(token) {
    return mixed.logProbs[token] - analysis.lmLogProbs[token];
  }

  function showTokens() {
    const box = at("tokens");
    tokens = analysis.pieces.map((piece, number) => {
      const span = element("span", { className: "token", role: "option", tabIndex: -1 });
      span.dataset.number = number;
      if (number >= analysis.generatedFrom) span.classList.add("written");
      piece.split("\n").forEach((line, part) => {
        if (part > 0) span.append(element("span", { className: "break", "aria-hidden": "true" }, "⏎"), "\n");
        span.append(line);
      });
      if (!piece) span.append("·");
      return span;
    });
    box.replaceChildren(...tokens);
    box.scrollTop = 0;
  }

  function update() {
    const from = analysis.generatedFrom < analysis.count ? analysis.generatedFrom : 0;
    mixed = Mixture.mix(analysis, settings, from);
    let helped = 0;
    let hurt = 0;
    tokens.forEach((span, token) => {
      const change = gain(token);
      if (change > 0) helped += 1;
      if (change < 0) hurt += 1;
      paint(span, change);
    });
    const lm = Mixture.perplexity(analysis.lmLogProbs);
    const knn = Mixture.perplexity(mixed.logProbs);
    figure("lm-perplexity", lm);
    figure("knn-perplexity", knn);
    const most = settings.reduce((sum, one) => sum + one.lmbda, 0);
    at("worst").textContent = most < 1 ? `At this λ no token loses more than ${(-Math.log1p(-most)).toFixed(2)} nats.` : "";
    at("change").textContent = `${signed((knn / lm - 1) * 100, 1)} %`;
    at("helped").textContent = `${percent(helped / analysis.count)} / ${percent(hurt / analysis.count)}`;
    at("tuned-figure").hidden = at("fixed-note").hidden = !analysis.tuned;
    if (analysis.tuned) figure("tuned-perplexity", Mixture.perplexity(analysis.tuned));
    showCredits(analysis.count - from, from > 0);
    if (selected >= 0) showToken();
  }

  function figure(id, perplexity) {
    const shown = Number.isFinite(perplexity) ? perplexity.toFixed(4) : "∞";
    at(id).textContent = shown;
    at(id).title = `perplexity ${perplexity}`;
  }

  function later() {
    cancelAnimationFrame(arranged);
    arranged = requestAnimationFrame(update);
  }

  // ---- one token ----

  function select(token, focus = true) {
    tokens[selected]?.setAttribute("aria-selected", "false");
    if (tokens[selected]) tokens[selected].tabIndex = -1;
    selected = token;
    opened = new Map();
    groups = undefined;
    tokens[token].setAttribute("aria-selected", "true");
    tokens[token].tabIndex = 0;
    if (focus) tokens[token].focus();
    at("detail").scrollTop = 0;
    showToken();
  }

  function showToken() {
    const state = { token: selected, settings, mixed, opened, groups };
    TokenPanel.show(at("detail"), analysis, state, {
      needed: isStandalone() ? null : fetchPassages,
      more: (vote) => {
        opened.set(vote, (opened.get(vote) ?? 3) + 5);
        showToken();
      },
      moreGroups: (count) => {
        groups = count;
        showToken();
      },
    });
  }

  /** Return the nearest token on the line above or below. */
  function inLine(step) {
    const own = tokens[selected].getBoundingClientRect();
    let found = selected;
    let line = null;
    for (let token = selected + step; tokens[token]; token += step) {
      const place = tokens[token].getBoundingClientRect();
      if (Math.abs(place.top - own.top) < 4) continue;
      if (line !== null && Math.abs(place.top - line) > 4) break;
      const distance = (other) => Math.abs(tokens[other].getBoundingClientRect().left - own.left);
      if (line === null || distance(token) < distance(found)) found = token;
      line = place.top;
    }
    return found;
  }

  at("tokens").addEventListener("click", (event) => {
    const span = event.target.closest(".token");
    if (span) select(Number(span.dataset.number));
  });
  at("tokens").addEventListener("keydown", (event) => {
    const last = tokens.length - 1;
    const moves = {
      ArrowLeft: () => Math.max(selected - 1, 0),
      ArrowRight: () => Math.min(selected + 1, last),
      ArrowUp: () => inLine(-1),
      ArrowDown: () => inLine(1),
      Home: () => 0,
      End: () => last,
    };
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    select(moves[event.key]());
  });

  // ---- documents ----

  function showCredits(count, isWritten) {
    at("documents-heading").textContent = isWritten
      ? `Who wrote the ${count} new tokens`
      : `Where the probability of the ${count.toLocaleString("en")} tokens comes from`;
    const rows = analysis.stores
      .flatMap((store, which) =>
        store.documents.map((one, place) => ({ name: one.name, which, place, worth: mixed.credits[which][place] })),
      )
      .filter(({ worth }) => worth >= 0.005)
      .sort((one, other) => other.worth - one.worth)
      .slice(0, 20);
    const line = (name, worth) =>
      element(
        "tr",
        {},
        element("td", {}, name),
        element("td", { className: "number" }, worth.toFixed(2)),
        element("td", { className: "number" }, percent(worth / count)),
        element("td", {}, bar(worth / count, "share")),
      );
    at("contributions").tBodies[0].replaceChildren(
      line("the language model itself", mixed.lmCredit),
      ...rows.map(({ name, which, place, worth }) => {
        const button = element("button", { type: "button", title: "outline its tokens" }, name);
        const isOn = credited?.which === which && credited.place === place;
        button.setAttribute("aria-pressed", String(isOn));
        button.addEventListener("click", () => {
          credited = isOn ? null : { which, place };
          showCredits(count, isWritten);
        });
        return line(button, worth);
      }),
    );
    const own = credited && Mixture.creditedTokens(analysis, settings, mixed, credited.which, credited.place);
    tokens.forEach((span, token) => span.classList.toggle("credited", Boolean(own?.has(token))));
  }

  // ---- the datastores ----

  async function showDatastores() {
    const { name, datastores } = await ask("/explorer/datastores");
    at("title").textContent = name;
    document.title = `knnlm · ${name}`;
    at("datastores").hidden = false;
    at("datastore-list").replaceChildren(...datastores.map(Overview.show));
  }

  // ---- begin ----

  function choose(tab, panels) {
    for (const other of ["tab-ask", "tab-chat"]) at(other).setAttribute("aria-selected", String(other === tab));
    for (const panel of ["ask", "result", "chat"]) at(panel).hidden = !panels.includes(panel);
    if (!analysis) at("result").hidden = true;
    say("");
    at(tab === "tab-chat" ? "message" : "text").focus();
  }

  function isStandalone() {
    return at("analysis") !== null;
  }

  if (isStandalone()) {
    show(Mixture.read(JSON.parse(at("analysis").textContent)));
    at("title").textContent = "explanation";
    document.title = "knnlm explanation";
    return;
  }
  at("tabs").hidden = at("ask").hidden = false;
  for (const [tab, panels] of [
    ["tab-ask", ["ask", "result"]],
    ["tab-chat", ["chat"]],
  ]) {
    at(tab).addEventListener("click", () => choose(tab, panels));
  }
  Chat.begin({ headers, say, refused });
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    explain(at("text").value);
  });
  at("continue").addEventListener("click", () => {
    if (at("ask").reportValidity()) write(at("text").value, Number(at("length").value));
  });
  at("file").addEventListener("change", async () => {
    const [file] = at("file").files;
    if (file) at("text").value = await file.text();
  });
  at("key").addEventListener("change", () => {
    key = at("key").value;
    begin();
  });
  const begin = () => showDatastores().then(() => say("")).catch((error) => say(error.message, true));
  begin();
})();
