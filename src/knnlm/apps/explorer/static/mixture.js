"use strict";
// The mixture p = Σ λ_i p_kNN,i + (1 − Σ λ_i) p_LM, from cached neighbors. Knows no page.

const Mixture = (() => {
  /** Decode little-endian base64 into a typed array. */
  function unpack(text, Type) {
    const characters = atob(text);
    const bytes = new Uint8Array(characters.length);
    for (let place = 0; place < bytes.length; place += 1) bytes[place] = characters.charCodeAt(place);
    return new Type(bytes.buffer);
  }

  /** Read an analysis (see analysis.py) from its JSON. */
  function read(plain) {
    return {
      model: plain.model,
      pieces: plain.pieces,
      count: plain.pieces.length,
      generatedFrom: plain.generated_from,
      vocabulary: plain.vocabulary,
      tokens: unpack(plain.tokens, Int32Array),
      lmLogProbs: unpack(plain.lm_log_probs, Float32Array),
      lmTop: unpack(plain.lm_top, Int32Array),
      lmTopLogProbs: unpack(plain.lm_top_log_probs, Float32Array),
      tuned: plain.tuned_log_probs && unpack(plain.tuned_log_probs, Float32Array),
      stores: plain.datastores.map((store) => ({
        ...store,
        squaredDistances: unpack(store.squared_distances, Float32Array),
        rows: unpack(store.rows, Int32Array),
        values: unpack(store.values, Int32Array),
        passages: new Map(Object.entries(store.passages ?? {})),
      })),
    };
  }

  /** Fill weights[0 … k − 1] with exp(−d²/T), the nearest being 1; return their sum, 0 for none. */
  function weigh(store, token, { k, temperature }, weights) {
    const first = token * store.k;
    const nearest = store.squaredDistances[first];
    if (!Number.isFinite(nearest)) return 0;
    let sum = 0;
    for (let rank = 0; rank < k; rank += 1) {
      const distance = store.squaredDistances[first + rank];
      weights[rank] = Math.exp((nearest - distance) / temperature);
      sum += weights[rank];
    }
    return sum;
  }

  /**
   * Mix every token of a text.
   * settings: {k, lmbda, temperature} for each store. Returns log p and p_kNN of every token (for
   * several datastores, their mean weighted by λ), and the credits of the LM and of each document,
   * credits[store][document]: their shares of the probability, added up over the tokens from `from`.
   */
  function mix(analysis, settings, from = 0) {
    const { count, stores, tokens } = analysis;
    const logProbs = new Float64Array(count);
    const knnProbs = new Float64Array(count);
    const credits = stores.map((store) => new Float64Array(store.documents.length));
    let lmCredit = 0;
    const weights = stores.map((store) => new Float64Array(store.k));
    const sums = new Float64Array(stores.length);
    const votes = new Float64Array(stores.length);
    for (let token = 0; token < count; token += 1) {
      let total = 0;
      let voted = 0;
      let present = 0;
      stores.forEach((store, which) => {
        const { k, lmbda } = settings[which];
        sums[which] = weigh(store, token, settings[which], weights[which]);
        votes[which] = 0;
        if (sums[which] === 0) return;
        const first = token * store.k;
        for (let rank = 0; rank < k; rank += 1) {
          if (store.values[first + rank] === tokens[token]) votes[which] += weights[which][rank];
        }
        votes[which] /= sums[which];
        total += lmbda;
        voted += lmbda * votes[which];
        present += 1;
      });
      total = Math.min(total, 1);
      const fromLm = (1 - total) * Math.exp(analysis.lmLogProbs[token]);
      const p = fromLm + voted;
      logProbs[token] = voted === 0 ? analysis.lmLogProbs[token] + Math.log1p(-total) : Math.log(p);
      if (total > 0) knnProbs[token] = voted / total;
      else if (present) knnProbs[token] = votes.reduce((sum, vote) => sum + vote, 0) / present;
      if (token < from || !(p > 0)) continue;
      lmCredit += fromLm / p;
      stores.forEach((store, which) => {
        if (!(votes[which] > 0) || settings[which].lmbda === 0) return;
        const scale = settings[which].lmbda / sums[which] / p;
        const first = token * store.k;
        for (let rank = 0; rank < settings[which].k; rank += 1) {
          if (store.values[first + rank] === tokens[token]) {
            const place = documentAt(store, store.rows[first + rank]);
            credits[which][place] += weights[which][rank] * scale;
          }
        }
      });
    }
    return { logProbs, knnProbs, credits, lmCredit };
  }

  /** Return the tokens that owe a tenth or more of their probability to a document. */
  function creditedTokens(analysis, settings, mixed, which, place) {
    const store = analysis.stores[which];
    const { k, lmbda } = settings[which];
    const weights = new Float64Array(store.k);
    const found = new Set();
    for (let token = 0; token < analysis.count; token += 1) {
      const sum = weigh(store, token, settings[which], weights);
      let part = 0;
      for (let rank = 0; sum > 0 && rank < k; rank += 1) {
        const neighbor = token * store.k + rank;
        if (store.values[neighbor] !== analysis.tokens[token]) continue;
        if (documentAt(store, store.rows[neighbor]) === place) part += weights[rank] / sum;
      }
      if (lmbda * part >= 0.1 * Math.exp(mixed.logProbs[token]) && part > 0) found.add(token);
    }
    return found;
  }

  /** Return the number of the document that holds a row. */
  function documentAt(store, row) {
    let low = 0;
    let high = store.documents.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (store.documents[middle].start <= row) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  /** Return the neighbors of one token, the heaviest first; weights are shares of p_kNN. */
  function neighbors(analysis, settings, token) {
    const found = [];
    const present = [];
    analysis.stores.forEach((store, which) => {
      const weights = new Float64Array(store.k);
      const sum = weigh(store, token, settings[which], weights);
      if (sum > 0) present.push({ which, weights, sum });
    });
    const total = present.reduce((sum, { which }) => sum + settings[which].lmbda, 0);
    for (const { which, weights, sum } of present) {
      const store = analysis.stores[which];
      const share = total > 0 ? settings[which].lmbda / total : 1 / present.length;
      for (let rank = 0; rank < settings[which].k; rank += 1) {
        const place = token * store.k + rank;
        if (store.rows[place] < 0) break;
        found.push({
          which,
          row: store.rows[place],
          token: store.values[place],
          squaredDistance: store.squaredDistances[place],
          weight: (share * weights[rank]) / sum,
        });
      }
    }
    // stable: nearest first among equals
    return found.sort((one, other) => other.weight - one.weight);
  }

  /** Group neighbors by the token that they vote for, the heaviest vote first. */
  function groupByVote(found) {
    const groups = new Map();
    for (const neighbor of found) {
      const group = groups.get(neighbor.token) ?? { token: neighbor.token, weight: 0, members: [] };
      group.weight += neighbor.weight;
      group.members.push(neighbor);
      groups.set(neighbor.token, group);
    }
    return [...groups.values()].sort((one, other) => other.weight - one.weight);
  }

  /** Return exp of the mean negative log-probability. */
  function perplexity(logProbs) {
    return Math.exp(-logProbs.reduce((sum, logProb) => sum + logProb, 0) / logProbs.length);
  }

  return { read, mix, creditedTokens, neighbors, groupByVote, perplexity, documentAt };
})();
