"use strict";
// The facts about a datastore.

const Overview = (() => {
  /** Return the element that shows the facts about a datastore. */
  function show(store) {
    const { k, lmbda, temperature } = store.parameters;
    const index =
      store.index.kind === "exact"
        ? "exact search"
        : store.index.recall === null // built by an older version, which kept no facts
        ? store.index.kind
        : `${store.index.kind}, finds ${percent(store.index.recall)} of the true ${store.index.k} nearest`;
    const facts = {
      folder: store.path,
      model: `${store.model}; keys: ${store.key}`,
      entries: `${store.entries.toLocaleString("en")}${store.forgotten_entries ? `, and ${store.forgotten_entries.toLocaleString("en")} forgotten` : ""}${store.is_unverified ? "; unverified: imported without its model" : ""}`,
      "on disk": `${(store.size_bytes / 1e6).toFixed(1)} MB`,
      index,
      mixture: `k ${k}, λ ${lmbda}, T ${temperature}${store.is_tuned ? "" : ", not tuned: knnlm tune finds better ones"}${store.is_learned ? ", and learned weights" : ""}`,
      documents: store.documents.toLocaleString("en"),
    };
    const list = element("dl");
    for (const [name, value] of Object.entries(facts)) list.append(element("dt", {}, name), element("dd", {}, value));
    const body = element("tbody");
    for (const { name, entries } of store.largest_documents) {
      body.append(element("tr", {}, element("td", {}, name), element("td", { className: "number" }, entries.toLocaleString("en"))));
    }
    const head = element("thead", {}, element("tr", {}, element("th", {}, "document"), element("th", {}, "entries")));
    return element("section", {}, list, element("div", { className: "names", tabIndex: 0 }, element("table", {}, head, body)));
  }

  return { show };
})();
