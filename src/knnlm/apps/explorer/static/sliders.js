"use strict";
// The sliders for λ, k and temperature, a set for each datastore.

const Sliders = (() => {
  const K_FACTOR = 2; // from one k of the slider to the next; the number field takes any k

  /**
   * Make the sliders. settings: {k, lmbda, temperature} for each store, changed in place.
   * changed: the numbers of the stores whose sliders were moved. later(): called after a change.
   */
  function make(stores, settings, changed, later) {
    const sets = document.createDocumentFragment();
    stores.forEach((store, which) => {
      const own = { ...store.parameters, k: Math.min(store.parameters.k, store.k) };
      const choices = [store.k, own.k];
      for (let k = 1; k < store.k; k *= K_FACTOR) choices.push(k);
      const ks = [...new Set(choices)].sort((one, other) => one - other);
      const take = (name, value) => {
        changed.add(which);
        settings[which][name] = value;
        later();
      };
      const fields = [
        field(`lmbda-${which}`, "λ, the weight of the neighbors", { min: 0, max: 1, step: 0.01 }, {
          read: () => settings[which].lmbda,
          take: (value) => take("lmbda", value),
          allowed: (value) => Math.min(Math.max(value, 0), roomFor(settings, which)),
        }),
        field(`k-${which}`, `k, neighbors that vote (of ${store.k} found)`, { min: 0, max: ks.length - 1, step: 1 }, {
          read: () => settings[which].k,
          take: (value) => take("k", value),
          allowed: (value) => Math.min(Math.max(Math.round(value), 1), store.k),
          toSlider: (k) => ks.findLastIndex((choice) => choice <= k),
          fromSlider: (place) => ks[place],
        }),
        field(`temperature-${which}`, "temperature of the distances", { min: -6, max: 6, step: 0.05 }, {
          read: () => settings[which].temperature,
          take: (value) => take("temperature", value),
          allowed: (value) => (value > 0 ? value : null),
          toSlider: (temperature) => Math.log2(temperature / own.temperature),
          fromSlider: (octaves) => Number((own.temperature * 2 ** octaves).toPrecision(3)),
        }),
      ];
      const reset = element("button", { type: "button" }, "reset");
      reset.addEventListener("click", () => {
        Object.assign(settings[which], own, { lmbda: Math.min(own.lmbda, roomFor(settings, which)) });
        changed.delete(which);
        fields.forEach(({ refresh }) => refresh());
        later();
      });
      const title = stores.length > 1 ? store.path : "The mixture: fixed weights, recomputed as you move the sliders";
      sets.append(
        element(
          "fieldset",
          { className: "sliders" },
          element("legend", {}, title),
          element("div", { className: "row" }, ...fields.map(({ box }) => box), reset),
        ),
      );
    });
    return sets;
  }

  /** Make a slider, next to a number field for exact values. */
  function field(id, title, scale, { read, take, allowed, toSlider = (x) => x, fromSlider = (x) => x }) {
    const range = element("input", { type: "range", id, ...scale });
    const number = element("input", { type: "number", id: `${id}-number`, step: "any", "aria-label": title });
    const refresh = (source) => {
      const value = read();
      if (source !== range) range.value = toSlider(value);
      if (source !== number) number.value = Number(value.toPrecision(6));
      range.setAttribute("aria-valuetext", String(value));
    };
    const receive = (given, source) => {
      const value = Number.isFinite(given) ? allowed(given) : null;
      if (value === null) return;
      take(value);
      refresh(source);
    };
    range.addEventListener("input", () => receive(fromSlider(Number(range.value)), range));
    number.addEventListener("input", () => receive(number.valueAsNumber, number));
    number.addEventListener("change", () => refresh());
    range.addEventListener("change", () => refresh());
    refresh();
    const box = element("div", { className: "slider" }, element("label", { htmlFor: id }, title), range, number);
    return { box, refresh };
  }

  /** Return the largest λ that the other datastores leave. */
  function roomFor(settings, which) {
    return Math.max(0, 1 - settings.reduce((sum, one, other) => (other === which ? sum : sum + one.lmbda), 0));
  }

  return { make };
})();
