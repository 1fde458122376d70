"use strict";
/* The report's data and state: index by columns, parts loaded on demand, order, filters, marks. */

const report = (() => {
  const PARTS_KEPT = 96; // a megabyte or two each
  const PARTS_AT_ONCE = 6;

  const state = {
    meta: null, rows: null, others: [], view: [], tab: "labelled",
    sort: null, down: true, search: "", markFilter: "", ranges: {}, reason: null,
    marks: null, undo: [], cursor: 0,
  };
  const parts = new Map(); // number -> samples, least recently used first
  const loading = new Map(); // number -> script element
  let wanted = []; // numbers, most wanted first
  const listeners = { part: [], view: [], marks: [] };

  const on = (what, call) => listeners[what].push(call);
  const tell = (what, value) => listeners[what].forEach((call) => call(value));

  /* ---- called by the data scripts */
  function meta(value) { state.meta = value; }

  function rows(table, others) {
    state.rows = table;
    state.others = others;
    state.count = table.key.length;
    state.marks = new Uint8Array(state.count); // 0 none, 1 keep, 2 drop
    state.text = table.key.map((key, i) => `${table.uri[i]} ${key}`.toLowerCase());
    for (const name of Object.keys(table.columns)) {
      table.columns[name] = Float64Array.from(table.columns[name], (v) => (v === null ? NaN : v));
    }
  }

  function part(number, samples) {
    parts.set(number, samples);
    const script = loading.get(number);
    if (script) script.remove();
    loading.delete(number);
    while (parts.size > PARTS_KEPT) parts.delete(parts.keys().next().value);
    tell("part", number);
    pump();
  }

  /* ---- parts */
  function sample(index) {
    const number = Math.floor(index / state.meta.part);
    const found = parts.get(number);
    if (!found) return null;
    parts.delete(number);
    parts.set(number, found); // now the most recently used
    return found[index % state.meta.part];
  }

  /* Ask for the parts of these samples; what was asked for before and is not loading is forgotten. */
  function want(indices) {
    const numbers = new Set(indices.map((i) => Math.floor(i / state.meta.part)));
    wanted = [...numbers].filter((n) => !parts.has(n) && !loading.has(n));
    pump();
  }

  function pump() {
    while (wanted.length && loading.size < PARTS_AT_ONCE) {
      const number = wanted.shift();
      if (parts.has(number) || loading.has(number)) continue;
      const script = document.createElement("script");
      script.src = `data/part-${String(number).padStart(5, "0")}.js`;
      script.onerror = () => {
        loading.delete(number);
        const missing = { damaged: `${script.src} is missing; was the folder copied whole?` };
        part(number, Array(state.meta.part).fill(missing));
      };
      loading.set(number, script);
      document.head.append(script);
    }
  }

  /* ---- order and filters */
  function update() {
    const { columns } = state.rows;
    const ranges = Object.entries(state.ranges).map(([name, [a, b]]) => [columns[name], a, b]);
    const query = state.search.trim().toLowerCase();
    const mark = { keep: 1, drop: 2, none: 0 }[state.markFilter];
    const view = [];
    for (let i = 0; i < state.count; i++) {
      if (mark !== undefined && state.marks[i] !== mark) continue;
      if (query && !state.text[i].includes(query)) continue;
      let inside = true;
      for (const [values, low, high] of ranges) {
        if (!(values[i] >= low && values[i] <= high)) { inside = false; break; }
      }
      if (inside) view.push(i);
    }
    order(view);
    state.view = view;
    tell("view");
  }

  function order(view) {
    const sign = state.down ? -1 : 1;
    const values = state.rows.columns[state.sort];
    if (values) {
      view.sort((a, b) => {
        const x = values[a], y = values[b];
        if (x === y || (x !== x && y !== y)) return a - b;
        if (x !== x) return 1; // no number: always last
        if (y !== y) return -1;
        return sign * (x - y);
      });
    } else {
      const texts = state.sort === "key" ? state.rows.key : state.rows.uri;
      view.sort((a, b) => sign * (texts[a] < texts[b] ? -1 : texts[a] > texts[b] ? 1 : 0) || a - b);
    }
  }

  const facts = (name) => state.meta.columns.find((c) => c.name === name);

  function sortBy(name, down) {
    const column = facts(name);
    state.sort = name;
    state.down = down === undefined ? (column ? column.worst === "high" : false) : down;
    state.cursor = 0;
    update();
  }

  /* ---- marks: kept in this browser until they are saved to a file */
  const MARKS = { none: 0, keep: 1, drop: 2 };
  const shelf = () => `dense-report ${state.meta.labels.plan_hash} ${state.meta.labels.keys_sha256}`;

  function mark(indices, name) {
    const value = MARKS[name];
    const changed = indices.filter((i) => state.marks[i] !== value);
    if (!changed.length) return;
    state.undo.push(changed.map((i) => [i, state.marks[i]]));
    if (state.undo.length > 200) state.undo.shift();
    for (const i of changed) state.marks[i] = value;
    marksChanged(changed);
  }

  function undo() {
    const last = state.undo.pop();
    if (!last) return;
    for (const [i, value] of last) state.marks[i] = value;
    marksChanged(last.map(([i]) => i));
  }

  function marksChanged(indices) {
    remember();
    tell("marks", indices);
  }

  function remember() {
    const kept = {};
    state.marks.forEach((value, i) => { if (value) kept[state.rows.key[i]] = value; });
    try { localStorage.setItem(shelf(), JSON.stringify(kept)); } catch { /* private window, full */ }
  }

  function recall() {
    let kept = {};
    try { kept = JSON.parse(localStorage.getItem(shelf()) || "{}"); } catch { /* none */ }
    state.rows.key.forEach((key, i) => { state.marks[i] = [1, 2].includes(kept[key]) ? kept[key] : 0; });
  }

  function tally() {
    let keep = 0, drop = 0;
    for (const value of state.marks) { if (value === 1) keep++; else if (value === 2) drop++; }
    return { keep, drop };
  }

  /* The selection file of teacher.jobs.selection; `only` takes just what is marked keep. */
  function selection(only) {
    const keep = [], dropped = {};
    state.rows.key.forEach((key, i) => {
      const value = state.marks[i];
      if (only ? value === 1 : value !== 2) keep.push(key);
      else dropped[key] = [value === 2 ? "marked drop" : "not marked keep"];
    });
    return {
      format: "dense-selection", version: 1, labels: state.meta.labels, made_by: "distill inspect",
      criteria: { marks: only ? "only what is marked keep" : "everything not marked drop" },
      keep, dropped,
    };
  }

  return {
    state, on, tell, meta, rows, part, sample, want, update, sortBy, facts, mark, undo, recall,
    tally, selection, MARKS, loads: () => ({ parts: parts.size, loading: loading.size }),
  };
})();
