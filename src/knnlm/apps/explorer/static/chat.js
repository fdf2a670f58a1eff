"use strict";
// The chat: answers appear as they are written; each of their tokens shows the passages behind it.

const Chat = (() => {
  const SOURCES = 4; // passages for each token
  const at = (id) => document.getElementById(id);
  let server; // {headers(), say(message, isWrong), refused(status)}
  let messages = [];
  let answering = null; // aborts the answer that is under way

  function begin(given) {
    server = given;
    at("speak").addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    at("message").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      at("speak").requestSubmit();
    });
    at("stop").addEventListener("click", () => answering?.abort());
    at("forget").addEventListener("click", () => {
      answering?.abort();
      messages = [];
      at("talk").replaceChildren();
      at("chat-detail").replaceChildren();
      server.say("");
      at("message").focus();
    });
  }

  function asked() {
    const body = { stream: true, temperature: 0, sources: SOURCES, max_tokens: at("chat-length").valueAsNumber };
    const lmbda = at("chat-lmbda").valueAsNumber;
    if (Number.isFinite(lmbda)) body.lmbda = lmbda;
    return body;
  }

  async function send() {
    if (answering) return;
    const said = at("message").value;
    const own = show("user", said);
    const answer = show("assistant", "");
    const conversation = [...messages, { role: "user", content: said }];
    answering = new AbortController();
    busy(true);
    at("message").value = "";
    server.say("Answering…");
    let content = "";
    let outcome = ["", false];
    try {
      const body = JSON.stringify({ ...asked(), messages: conversation });
      const options = { method: "POST", body, headers: server.headers(), signal: answering.signal };
      for await (const choice of choices(await fetch("/v1/chat/completions", options))) {
        content += choice.delta.content ?? "";
        answer.append(...(choice.sources ?? []).map(written));
        answer.parentElement.scrollIntoView({ block: "nearest" });
      }
      const count = answer.childElementCount;
      outcome = [count ? `${count} tokens. Choose one to see the passages behind it.` : "It says nothing.", false];
    } catch (error) {
      if (error.name !== "AbortError") outcome = [`It failed: ${error.message}`, true];
    }
    if (!answer.isConnected) {
      // a new conversation was begun
    } else if (content) {
      messages = [...conversation, { role: "assistant", content }];
      if (answer.firstElementChild) select(answer.firstElementChild, false);
    } else {
      // as if it had not been said
      own.parentElement.remove();
      answer.parentElement.remove();
      if (!at("message").value) at("message").value = said;
    }
    answering = null;
    busy(false);
    at("speak").scrollIntoView({ block: "nearest" });
    server.say(...outcome);
  }

  function busy(isBusy) {
    at("send").disabled = isBusy;
    at("stop").hidden = !isBusy;
  }

  /** Yield the choices of a stream of server-sent events. */
  async function* choices(answer) {
    if (!answer.ok) {
      const { error } = await answer.json().catch(() => ({ error: { message: answer.statusText } }));
      throw new Error(server.refused(answer.status) ?? error.message);
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        yield* chunk.choices;
      }
    }
  }

  function show(role, text) {
    const said = element("div", { className: "said" }, text);
    const name = role === "user" ? "You" : "Model";
    at("talk").append(element("div", { className: `turn ${role}` }, element("h3", {}, name), said));
    said.scrollIntoView({ block: "nearest" });
    return said;
  }

  function written(token) {
    const span = element("span", { className: "token", role: "button", tabIndex: -1 }, token.text || "·");
    paint(span, token.gain);
    span.addEventListener("click", () => select(span));
    span.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: span.previousElementSibling, ArrowRight: span.nextElementSibling, Enter: span }[event.key];
      if (!to) return;
      event.preventDefault();
      select(to);
    });
    span.explained = token;
    return span;
  }

  function select(span, focus = true) {
    at("talk").querySelectorAll("[aria-pressed='true']").forEach((other) => {
      other.setAttribute("aria-pressed", "false");
      other.tabIndex = -1;
    });
    span.setAttribute("aria-pressed", "true");
    span.tabIndex = 0;
    if (focus) span.focus();
    const token = span.explained;
    at("chat-detail").replaceChildren(
      element("h2", {}, "Token ", element("code", {}, visible(token.text))),
      element(
        "p",
        { className: "chain" },
        `p of the LM ${probability(Math.exp(token.lm_log_prob))}, of the neighbors `,
        `${probability(token.knn_prob)}, mixed `,
        element("strong", {}, probability(Math.exp(token.log_prob))),
        `: ${signed(token.gain)} nats`,
      ),
      element("h3", {}, token.sources.length ? "The neighbors with the most weight" : "No neighbors voted"),
      ...token.sources.map((source) => passage(source, source.token === token.token)),
    );
    at("chat-detail").scrollTop = 0;
  }

  function passage(source, isOwn) {
    return element(
      "section",
      { className: isOwn ? "vote true" : "vote" },
      element(
        "div",
        { className: "where" },
        `${percent(source.weight)} · d² ${distance(source.squared_distance)} · `,
        `${source.document}, token ${source.position}${isOwn ? " · voted for this token" : ""}`,
      ),
      element(
        "blockquote",
        { className: "passage" },
        source.before && `…${source.before}`,
        element("mark", {}, source.value.trim() ? source.value : visible(source.value)),
        `${source.after}…`,
      ),
    );
  }

  return { begin };
})();
