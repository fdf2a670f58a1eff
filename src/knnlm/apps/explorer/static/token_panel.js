"use strict";
// The panel for one token: its probabilities, both distributions, and its neighbors by their vote.

/** Make an element; text stays text, even if it looks like markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Show white space and control characters. */
function visible(text) {
  const marks = { "\n": "⏎", "\r": "␍", "\t": "→", "": "∅" };
  if (text === "") return "∅";
  return text
    .replace(/[\n\r\t]/g, (character) => marks[character])
    .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length))
    .replace(/[\u0000-\u001f\u007f]/g, "�");
}

function percent(share) {
  if (share > 0 && share < 0.0005) return "<0.1 %";
  return `${(share * 100).toFixed(1)} %`;
}

function probability(value) {
  if (value === 0) return "0";
  return value < 0.001 ? value.toExponential(1) : value.toFixed(3);
}

function distance(value) {
  return value < 0.01 ? value.toExponential(1) : value.toPrecision(4);
}

function signed(value, digits = 2) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
}

function bar(share, label) {
  return element("progress", { max: 1, value: Math.min(share, 1), "aria-label": label });
}

/** Color a token by the change of its log-probability, in nats. */
function paint(span, change) {
  const level = [0.1, 0.5, 1, 2].filter((least) => Math.abs(change) >= least).length;
  const effect = level === 0 ? "none" : change > 0 ? "help" : "hurt";
  if (span.dataset.effect !== effect) span.dataset.effect = effect;
  if (span.dataset.level !== String(level)) span.dataset.level = level;
}

const TokenPanel = (() => {
  const GROUPS = 6;
  const MEMBERS = 3;
  const LISTED = 10;

  function distribution(title, entries, own, vocabulary) {
    const list = element("ol");
    for (const { token, share } of entries) {
      const text = visible(vocabulary[token] ?? "");
      list.append(
        element(
          "li",
          { className: token === own ? "true" : "" },
          element("code", { title: text }, text),
          bar(share, text),
          element("span", { className: "number" }, percent(share)),
        ),
      );
    }
    if (!entries.length) list.append(element("li", {}, "nothing"));
    return element("div", {}, element("h3", {}, title), list);
  }

  function lmEntries(analysis, token) {
    const size = analysis.lmTop.length / analysis.count;
    const places = Array.from({ length: size }, (_, place) => token * size + place);
    const entries = places.map((place) => ({
      token: analysis.lmTop[place],
      share: Math.exp(analysis.lmTopLogProbs[place]),
    }));
    const own = analysis.tokens[token];
    if (!entries.some((entry) => entry.token === own)) {
      entries[size - 1] = { token: own, share: Math.exp(analysis.lmLogProbs[token]) };
    }
    return entries;
  }

  /** Return the heaviest groups; the token's own is among them, if there is one. */
  function chosen(groups, own, count) {
    const heaviest = groups.slice(0, count);
    const ownGroup = groups.find((group) => group.token === own);
    if (ownGroup && !heaviest.includes(ownGroup)) heaviest[heaviest.length - 1] = ownGroup;
    return heaviest;
  }

  function passage(neighbor, texts) {
    const text = texts.get(String(neighbor.row));
    if (!text) return element("p", { className: "note" }, "(passage not available)");
    return element(
      "blockquote",
      { className: "passage" },
      text.before && `…${text.before}`,
      element("mark", {}, text.value.trim() ? text.value : visible(text.value)),
      `${/^\s+$/.test(text.value) ? text.value.replace(/^ +/, "") : ""}${text.after}…`,
    );
  }

  function neighborItem(analysis, neighbor) {
    const store = analysis.stores[neighbor.which];
    const document_ = store.documents[Mixture.documentAt(store, neighbor.row)];
    const where = document_ ? `${document_.name}, token ${neighbor.row - document_.start}` : "";
    return element(
      "li",
      {},
      element(
        "div",
        { className: "where" },
        `${percent(neighbor.weight)} · d² ${distance(neighbor.squaredDistance)} · ${where}`,
        analysis.stores.length > 1 ? ` · ${store.path}` : "",
      ),
      passage(neighbor, store.passages),
    );
  }

  function voteSection(analysis, group, own, members, more) {
    const shown = group.members.slice(0, members);
    const section = element(
      "section",
      { className: group.token === own ? "vote true" : "vote" },
      element(
        "h3",
        {},
        element("code", {}, visible(analysis.vocabulary[group.token] ?? "")),
        ` ${percent(group.weight)} of the vote, ${group.members.length} `,
        group.members.length === 1 ? "neighbor" : "neighbors",
        group.token === own ? " · the token itself" : "",
      ),
      element("ul", {}, ...shown.map((neighbor) => neighborItem(analysis, neighbor))),
    );
    if (more && shown.length < group.members.length) {
      const button = element("button", { type: "button" }, "show more");
      button.addEventListener("click", () => more(group.token));
      section.append(button);
    }
    return section;
  }

  /**
   * Show a token. state: {token, settings, mixed, opened, groups}; opened: how many members are
   * shown of each vote. needed(neighbors): fetches missing passages; null if there is no server.
   */
  function show(panel, analysis, state, { needed, more, moreGroups }) {
    const { token, settings, mixed } = state;
    const own = analysis.tokens[token];
    const found = Mixture.neighbors(analysis, settings, token);
    const groups = Mixture.groupByVote(found);
    const sections = chosen(groups, own, state.groups ?? GROUPS);
    sections.sort((one, other) => (other.token === own) - (one.token === own)); // its own first
    const count = (group) => state.opened.get(group.token) ?? MEMBERS;
    const lm = analysis.lmLogProbs[token];
    const tuned = analysis.tuned ? analysis.tuned[token] : null;
    panel.replaceChildren(
      element(
        "h2",
        {},
        "Token ",
        element("code", {}, visible(analysis.pieces[token] || analysis.vocabulary[own])),
        ` (${token} of 0–${analysis.count - 1})`,
      ),
      element(
        "p",
        { className: "chain" },
        `p of the LM ${probability(Math.exp(lm))}, of the neighbors `,
        `${probability(mixed.knnProbs[token])}, mixed `,
        element("strong", {}, probability(Math.exp(mixed.logProbs[token]))),
        `: ${signed(mixed.logProbs[token] - lm)} nats`,
        tuned === null ? "" : `; with tuned weights ${signed(tuned - lm)} nats`,
      ),
      element(
        "div",
        { className: "distributions" },
        distribution("The LM expects", lmEntries(analysis, token), own, analysis.vocabulary),
        distribution(
          `${found.length} neighbors vote for`,
          chosen(groups, own, LISTED).map((group) => ({ token: group.token, share: group.weight })),
          own,
          analysis.vocabulary,
        ),
      ),
      ...sections.map((group) => voteSection(analysis, group, own, count(group), more)),
    );
    if (sections.length < groups.length) {
      const button = element("button", { type: "button" }, `show more of the ${groups.length} votes`);
      button.addEventListener("click", () => moreGroups(sections.length + 2 * GROUPS));
      panel.append(button);
    }
    const missing = sections
      .flatMap((group) => group.members.slice(0, count(group)))
      .filter(({ which, row }) => !analysis.stores[which].passages.has(String(row)));
    if (missing.length && needed) needed(missing);
  }

  return { show };
})();
